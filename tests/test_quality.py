import pytest
import tiny
from PIL import Image

from navit_jax import train
from navit_jax.data.quality import Named, QualityLimit
from navit_jax.errors import ConfigError, DataError


def test_the_limit_is_a_share_of_the_last_10_000_planned_images():
    quality = QualityLimit(0.01)
    for _ in range(1000):  # 100 bad ones at a time, but never more in 10,000
        quality.check(100, 1)
    with pytest.raises(DataError, match="101 of the last 10000 planned"):
        quality.check(100, 2)


def test_old_ones_are_forgotten():
    quality = QualityLimit(0.01)
    quality.check(100, 100)
    for _ in range(99):
        quality.check(100, 0)
    quality.check(100, 100)  # the first hundred left the window with this step


def test_a_window_goes_on_from_a_checkpoint():
    quality = QualityLimit(0.01)
    quality.check(500, 60)
    resumed = QualityLimit(0.01, quality.window())
    with pytest.raises(DataError, match="120 of the last 1000"):
        resumed.check(500, 60)


def test_the_table_has_each_reason_its_number_and_its_first_image():
    quality = QualityLimit(0.0001)
    quality.note([("a.jpg", "truncated"), ("b.jpg", "empty"), ("c.jpg", "truncated")])
    with pytest.raises(DataError, match=r"(?s)2 +truncated +first: a.jpg.*1 +empty"):
        quality.check(10, 3)


def test_a_limit_of_0_ends_at_the_first_bad_image_and_of_1_never():
    strict, tolerant = QualityLimit(0), QualityLimit(1)
    strict.check(40_000, 0)
    with pytest.raises(DataError, match="1 of the last 40001 planned"):
        strict.check(1, 1)
    for planned in (1, 7000, 7000, 40_000):  # steps larger than the window too
        tolerant.check(planned, planned)


def test_of_a_step_larger_than_the_window_the_same_share_may_be_bad():
    QualityLimit(0.01).check(40_000, 400)
    with pytest.raises(DataError, match=r"401 of the last 40000 .* 1.0% of 40,000"):
        QualityLimit(0.01).check(40_000, 401)


@pytest.mark.parametrize("limit", [-0.1, 1.5])
def test_a_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(ConfigError, match=rf"train.bad_images={limit}: give a share"):
        QualityLimit(limit)


def test_a_run_ends_at_its_first_bad_picture_or_never(tmp_path):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    (folder / "cut.png").write_bytes(b"")
    for i in range(20):
        Image.new("RGB", (40, 40)).save(folder / f"{i}.png")
    sources = {"mine": {"name": "folder", "path": str(tmp_path / "data")}}
    changes = {"data__sources": sources, "steps": 2, "train__report_every": 1}
    changes |= tiny.PLAIN
    with pytest.raises(DataError, match=r"empty +first: .*cut.png") as error:
        train.train(tiny.config(**changes, train__bad_images=0), tmp_path / "strict")
    assert error.value.exit_code == 3
    train.train(tiny.config(**changes, train__bad_images=1), tmp_path / "tolerant")
    (metrics,) = (tmp_path / "tolerant").glob("metrics*.jsonl")
    assert '"step": 2' in metrics.read_text()


def test_images_are_named_once_and_not_without_end(caplog):
    caplog.set_level("INFO")
    named = Named("shrunk", most=3)
    for names in (["a", "b", "a"], ["b"], ["c", "d", "e"], ["f"]):
        named.note(names)
    assert [record.getMessage() for record in caplog.records] == [
        "shrunk: a, b",
        "shrunk: c, ...; no more are named",
    ]
