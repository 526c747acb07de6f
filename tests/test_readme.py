import re
import subprocess
import sys

import jax
import numpy as np
import tiny
from etils import epath
from packed import image, pack
from PIL import Image

import navit_jax
from navit_jax import reporting, run_folder
from navit_jax.data import packers, sources


def test_the_command_of_the_readme_trains_on_a_folder_and_judges_on_a_part(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(60):
        kind = tmp_path / "pictures" / ("ant", "bee", "cow")[number % 3]
        kind.mkdir(parents=True, exist_ok=True)
        shape = (*rng.integers(20, 60, 2), 3)
        image = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        image.save(kind / f"{number}.png")
    command = r"-m navit_jax\.train --config=configs/folder\.py:(\S+) --workdir=(\S+)"
    (found,) = re.finditer(command, (tiny.ROOT / "README.md").read_text())
    for other in ("Makefile", "docs/running.md"):
        assert (
            f"--config=configs/folder.py:{found[1]}" in (tiny.ROOT / other).read_text()
        )
    words = found[0].replace(found[1], f"{tmp_path}/pictures").split()
    words[-1] = f"--workdir={tmp_path}/run"
    small = ("steps=2", "data.tokens=100", "data.slots=8", "model.width=16")
    small += ("model.depth=1", "model.num_heads=2", "model.mlp=16")
    done = subprocess.run(
        [sys.executable, *words, *(f"--config.{change}" for change in small)],
        cwd=tiny.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    workdir = epath.Path(tmp_path) / "run"
    assert run_folder.read_class_names(workdir) == ["ant", "bee", "cow"]
    values = reporting.read_metrics(workdir)[-1]
    held_out = sources.folder(f"{tmp_path}/pictures", split="validation")
    assert 0 < len(held_out) < 20
    for side in (96, 128):
        assert values[f"eval/validation_{side}/images"] == len(held_out)
        assert 0 <= values[f"eval/validation_{side}/accuracy"] <= 1


def test_the_library_calls_of_the_readme_work_as_written():
    text = (tiny.ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = (block for block in blocks if "assign_rows" in block)
    batch = pack([[image(1, (3, 4)), image(2, (2, 2))]])
    q = jax.random.normal(jax.random.key(0), (1, 32, 2, 4))
    scope = {
        "navit_jax": navit_jax,
        "q": q,
        "k": q,
        "v": q,
        "segment_ids": jax.numpy.asarray(batch.segment_ids),
    }
    exec(code, scope | {"batch": batch, "apply": lambda batch: batch.patches}, scope)
    assert scope["rows"].tolist() == [0, 0, 1, 0]
    assert scope["out"].shape == q.shape


def test_the_public_packer_is_pure():
    assert navit_jax.assign_rows is packers.assign_rows
    lengths = np.random.default_rng(0).integers(1, 200, (100, 2))
    before = lengths.copy()
    rows, again = (navit_jax.assign_rows(lengths, [256, 300], 8) for _ in range(2))
    np.testing.assert_array_equal(lengths, before)
    np.testing.assert_array_equal(rows, again)
    assert rows.shape == (100,)
