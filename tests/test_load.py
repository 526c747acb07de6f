import numpy as np
import pytest
import tiny

from navit_jax import experiment
from navit_jax.data import images
from navit_jax.data.patches import keep_patches
from navit_jax.data.rows import Batches


@pytest.fixture(scope="module")
def stream():
    return experiment.build_stream(
        tiny.config(data__token_drop={"name": "constant", "rate": 0.4})
    )


def test_a_loaded_batch_holds_what_its_plan_says_done_plainly(stream):
    batch, info = next(stream.batches(np.arange(8)))
    (source,), done = stream.loader.sources, []
    for b, row in enumerate(Batches(stream.plan).rows(0)):
        start = 0
        for i in range(len(row.index)):
            record = source[int(row.index[i])]
            assert info.keys[b][i] == f"clipart:{record.key}"
            rows, columns = row.grid[i].tolist()
            pixels, _ = images.read(
                record.image,
                tuple(row.size[i].tolist()),
                (16 * rows, 16 * columns),
                box=tuple(row.box[i].tolist()),
            )
            if row.flip[i]:
                pixels = pixels[:, ::-1].copy()
            jittered = images.jitter(pixels, *row.jitter[i].tolist())
            changes = np.abs(jittered.astype(int) - pixels).max()
            stop = start + int(row.kept[i])
            places = batch.coords[b, start:stop]
            kept = keep_patches(rows * columns, stop - start, int(row.drop_key[i]))
            np.testing.assert_array_equal(places @ [columns, 1], kept)
            for token, (r, c) in enumerate(places, start):
                block = jittered[16 * r : 16 * r + 16, 16 * c : 16 * c + 16]
                np.testing.assert_array_equal(batch.patches[b, token], block.ravel())
            assert (batch.segment_ids[b, start:stop] == i + 1).all()
            assert batch.grids[b, i].tolist() == [rows, columns]
            assert batch.image_ids[b, i].tolist() == [0, row.index[i]]
            labels = batch.targets["labels"][b, i]
            assert tuple(labels[labels >= 0]) == record.labels
            done.append((row.flip[i], changes > 0, stop - start < rows * columns))
            start = stop
        assert not batch.segment_ids[b, start:].any()
        assert not batch.patches[b, start:].any()
        assert batch.image_mask[b].sum() == len(row.index)
    # All that can be done to an image was done to some, and flipping not to all.
    flipped, changed, dropped = np.array(done).mean(0)
    assert 0.2 < flipped < 0.8
    assert changed > 0.8
    assert dropped > 0.5


def test_images_that_had_to_shrink_are_named():
    config = tiny.config(
        data__tokens=80,
        data__resolution={"name": "native"},
        data__crop={"name": "none"},
    )
    stream = experiment.build_stream(config)
    _, info = next(stream.batches(np.arange(8)))
    window, source = stream.plan.plan_window(0, 0), stream.loader.sources[0]
    expected, seen = [], 0
    for row in (window.row(r) for r in range(8)):
        for index, size in zip(row.index, row.size, strict=True):
            # At its own size an image has as many patches as go into it.
            if np.maximum(size // 16, 1).prod() > 80:
                expected.append(f"clipart:{source[int(index)].key}")
            seen += 1
    assert 0 < len(expected) < seen
    assert info.shrunk == expected
