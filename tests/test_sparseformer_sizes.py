"""Named SparseFormers: what they cost, and what is said of wrong ones."""

import pytest
from small_sparseformer import build, trace

from navit_jax.errors import ConfigError
from navit_jax.models import sparseformer, sparseformer_sizes
from navit_jax.models.sparseformer import SparseFormer


@pytest.mark.parametrize(
    "name, parameters, with_stem, without",
    [
        ("v1_tiny", 31_522_212, 2.178, 2.001),
        ("v1_small", 47_575_056, 3.990, 3.813),
        ("v1_base", 81_076_996, 7.987, 7.810),
        ("v2_augreg_b", 64_185_448, 3.778, 3.660),
        ("v2_augreg_l", 212_426_984, 11.343, 11.225),
        ("v2_clip_b", 63_809_664, 3.778, 3.660),
        ("v2_clip_l", 212_188_476, 14.823, 14.705),
    ],
)
def test_a_name_has_the_published_parameters_and_multiply_adds(
    name, parameters, with_stem, without
):
    assert sparseformer.num_parameters(name) == parameters
    macs = [round(each / 1e9, 3) for each in sparseformer.num_macs(name)]
    assert macs == [with_stem, without]


@pytest.mark.parametrize(
    "name, special, table",
    [
        ("v1_tiny", 0, {9: 0.54, 16: 0.83, 25: 1.19, 36: 1.64, 64: 2.80, 81: 3.51}),
        ("v2_augreg_b", 1, {9: 0.77, 16: 1.29, 25: 1.97, 36: 2.80, 64: 4.92}),
        ("v2_augreg_l", 1, {9: 2.15, 16: 3.75, 25: 5.81, 36: 8.34, 81: 18.79}),
    ],
)
def test_multiply_adds_follow_the_number_of_tokens(name, special, table):
    for count, expected in table.items():
        found, _ = sparseformer.num_macs(name, 224, count - special)
        assert abs(found / 1e9 - expected) < 0.006


def test_only_the_stem_grows_with_the_picture():
    large, small = (sparseformer.num_macs("v1_tiny", side) for side in (512, 224))
    assert large[1] == small[1]
    assert (large[0] - large[1]) / (small[0] - small[1]) == (512 / 224) ** 2


def test_misspelt_names_are_met_with_the_nearest():
    for attributes, message in (
        ({"size": "v1_tinny/16"}, "did you mean 'v1_tiny'"),
        ({"size": "v1_tiny"}, "as 'v1_tiny/16'"),
        ({"shape": {"point": 4}}, "config.model.shape.point is unknown; did you mean"),
        ({"shape": {"num_heads": 5}}, "num_heads=5 does not divide width=512"),
        ({"allot": "drwan"}, "config.model.allot='drwan'"),
        ({"maps": "canvass"}, "config.model.maps='canvass'"),
    ):
        with pytest.raises(ConfigError, match=message):
            trace(SparseFormer(**{"size": "v1_tiny/2", **attributes}))
    with pytest.raises(ConfigError, match="'smaple': did you mean 'sample'"):
        trace(build(shape={"focus": ("smaple",)}))


def test_too_little_room_is_said_with_what_is_needed():
    for attributes in ({}, {"allot": "drawn", "counts": (1, 4)}):
        with pytest.raises(ConfigError, match=r"latents=15: 4 images .* give 16"):
            trace(build(latents=15, **attributes))


def test_no_latent_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"shape.latents=0: an image has one"):
        sparseformer_sizes.named("v1_tiny/16", {"latents": 0})
