import numpy as np
import pytest

from navit_jax import config
from navit_jax.data import crop
from navit_jax.errors import ConfigError


def law(**section):
    return config.build(section, crop.LAWS, "data.crop")


@pytest.mark.parametrize("aspect", [0.2, 1.0, 3.0])
def test_inception_boxes_lie_in_the_image_with_area_and_aspect_in_range(aspect):
    M = 4000
    rng = np.random.default_rng(0)
    sizes = np.tile([[1000 / aspect**0.5, 1000 * aspect**0.5]], (M, 1))
    boxes = law(name="inception")(lambda purpose: rng.random(M), sizes)
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    height, width = ((boxes[:, 2:] - boxes[:, :2]) * sizes).T
    # As far from the top as from the bottom, and so the sides.
    assert np.abs((boxes[:, :2] + boxes[:, 2:] - 1).mean(0)).max() < 0.02
    whole = (boxes == [0, 0, 1, 1]).all(1)
    area, shape = height * width / 1e6, width / height
    assert area[~whole].min() > 0.05 - 1e-9
    assert shape[~whole].min() > 3 / 4 - 1e-9
    assert shape[~whole].max() < 4 / 3 + 1e-9
    assert whole.mean() < 0.25
    if aspect == 1.0:
        # Boxes of up to 3/4 of the area always fit: drawn areas are even there.
        counts, _ = np.histogram(area, 7, (0.05, 0.75))
        assert counts.max() < 1.3 * counts.min()


def test_none_keeps_the_whole_image():
    boxes = law(name="none")(lambda purpose: np.zeros(2), np.ones((2, 2)))
    assert boxes.tolist() == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "inception", "area_low": 0}, "crop.area_low=0"),
        ({"name": "inception", "area_high": 1.5}, "area_high=1.5"),
        ({"name": "inception", "aspect_low": 2}, "aspect_low=2"),
    ],
)
def test_a_wrong_crop_names_the_field(section, message):
    with pytest.raises(ConfigError, match=message):
        law(**section)
