import pytest

from navit_jax.data.quality import QualityLimit
from navit_jax.errors import DataError


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
