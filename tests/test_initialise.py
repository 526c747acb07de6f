import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from navit_jax import experiment, initialise, paths, sharding, train
from navit_jax.errors import ConfigError


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make(seed, length=8, classes=3):
    return {
        "encoder": {
            "embed": {"kernel": normal(seed, 5, 4)},
            "positions": {"tables": normal(seed + 1, 2, length, 4)},
        },
        "head": {"kernel": normal(seed + 2, 4, classes)},
    }


def kinds(origins):
    return {origin.name: origin.how for origin in origins}


def test_equal_trees_are_loaded_whole():
    source = make(10)
    params, origins = initialise.load_params(make(0), source)
    jax.tree.map(np.testing.assert_array_equal, params, source)
    assert set(kinds(origins).values()) == {"loaded"}


def test_a_new_head_stays_as_initialised():
    fresh = make(0, classes=7)
    params, origins = initialise.load_params(
        fresh,
        make(10),
        rules=(("head/.*", ""), ("(.*)", r"\1")),
        allow_unused=("head/.*",),
    )
    np.testing.assert_array_equal(params["head"]["kernel"], fresh["head"]["kernel"])
    embed = params["encoder"]["embed"]["kernel"]
    np.testing.assert_array_equal(embed, make(10)["encoder"]["embed"]["kernel"])
    assert [(o.name, o.how) for o in origins if "head" in o.name] == [
        ("head/kernel", "initialised"), ("head/kernel", "unused"),
    ]  # fmt: skip


def test_names_are_mapped_by_groups_of_a_pattern():
    source = {"vit": make(10)["encoder"], "top": make(10)["head"]}
    rules = ((r"encoder/(.*)", r"vit/\1"), (r"head/(.*)", r"top/\1"))
    params, _ = initialise.load_params(make(0), source, rules=rules)
    jax.tree.map(np.testing.assert_array_equal, params, make(10))


def test_what_is_not_used_fails_and_the_message_holds_the_table():
    source = make(10) | {"text": {"embedding": normal(3, 2, 2)}}
    with pytest.raises(ConfigError, match="text/embedding") as error:
        initialise.load_params(make(0), source)
    assert "loaded" in str(error.value)
    assert "config.model.init.allow_unused" in str(error.value)
    initialise.load_params(make(0), source, allow_unused=("text/.*",))


@pytest.mark.parametrize(
    "options, match",
    [
        ({}, r"tables has shape \(2, 8, 4\), the source \(2, 5, 4\)"),
        ({"resample": ((".*tables", "cubic"),)}, "'cubic'; .*Known: copy, interpolate"),
        ({"resample": ((".*tabels", "copy"),)}, "'.*tabels' matches no parameter"),
        ({"rules": (("haed/.*", ""),)}, "'haed/.*' matches no parameter"),
        ({"rules": (("(.*)", r"\2"),)}, r"rules: '\\\\2' for .* invalid group"),
        ({"allow_unused": ("(",)}, "no regular expression"),
    ],
)
def test_a_mistake_is_named(options, match):
    with pytest.raises(ConfigError, match=match):
        initialise.load_params(make(0), make(10, length=5), **options)


def test_a_table_of_another_width_is_refused():
    fresh, source = {"tables": normal(0, 8, 4)}, {"tables": normal(1, 5, 6)}
    with pytest.raises(ConfigError, match="rank and width must agree"):
        initialise.load_params(fresh, source, resample=((".*", "interpolate"),))


def stretch(table, size, axis):
    """Linear interpolation between points at half-integer places, in numpy."""
    length = table.shape[axis]
    places = (np.arange(size) + 0.5) * length / size - 0.5
    return np.apply_along_axis(
        lambda line: np.interp(places, np.arange(length), line), axis, table
    )


@pytest.mark.parametrize("size", [3, 8, 13])
def test_factorised_tables_are_interpolated_along_their_length(size):
    fresh, source = make(0, length=size), make(10, length=8)
    params, origins = initialise.load_params(
        fresh, source, resample=((".*/tables", "interpolate"),)
    )
    expected = stretch(np.float64(source["encoder"]["positions"]["tables"]), size, 1)
    got = params["encoder"]["positions"]["tables"]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    how = "loaded" if size == 8 else "interpolated"
    assert kinds(origins)["encoder/positions/tables"] == how


def test_a_grid_is_interpolated_along_both_sides():
    source = {"table": normal(1, 5, 5, 4)}
    params, _ = initialise.load_params(
        {"table": normal(0, 7, 7, 4)}, source, resample=(("table", "interpolate"),)
    )
    expected = stretch(stretch(np.float64(source["table"]), 7, 0), 7, 1)
    np.testing.assert_allclose(params["table"], expected, atol=1e-5)


@pytest.mark.parametrize("size", [3, 13])
def test_copied_tables_keep_what_is_beyond_as_initialised(size):
    fresh, source = normal(0, 2, size, 4), normal(1, 2, 8, 4)
    params, origins = initialise.load_params(
        {"t": fresh}, {"t": source}, resample=(("t", "copy"),)
    )
    shared = min(size, 8)
    np.testing.assert_array_equal(params["t"][:, :shared], source[:, :shared])
    np.testing.assert_array_equal(params["t"][:, shared:], fresh[:, shared:])
    assert kinds(origins) == {"t": "copied"}


def test_dtype_and_sharding_are_those_of_the_fresh_parameters():
    mesh = sharding.make_mesh(1, 4, 2)
    place = NamedSharding(mesh, P("fsdp", "tensor"))
    fresh = {"kernel": jax.device_put(jnp.zeros((8, 4), jnp.bfloat16), place)}
    source = {"kernel": np.arange(32.0).reshape(8, 4)}
    params, _ = initialise.load_params(fresh, source)
    assert params["kernel"].dtype == jnp.bfloat16
    assert params["kernel"].sharding == place
    np.testing.assert_array_equal(params["kernel"], source["kernel"])


def test_the_table_has_a_line_for_each_parameter_and_the_counts():
    _, origins = initialise.load_params(
        make(0, length=9), make(10), rules=(("encoder/(.*)", r"encoder/\1"),),
        resample=((".*tables", "copy"),), allow_unused=("head/.*",),
    )  # fmt: skip
    lines = initialise.format_table(origins).splitlines()
    assert len(lines) == 3 + 1 + 1
    assert lines[1].split()[:2] == ["copied", "encoder/positions/tables"]
    assert lines[-1] == "1 copied, 1 initialised, 1 loaded, 1 unused"
    assert len(paths.flatten(make(0))) == 3


def test_what_is_only_described_stays_so_is_not_told_and_its_source_is_used():
    fresh, source = make(0), make(10)
    described = jax.eval_shape(lambda tree: tree, fresh["encoder"])
    params, origins = initialise.load_params({**fresh, "encoder": described}, source)
    assert params["encoder"] == described
    np.testing.assert_array_equal(params["head"]["kernel"], source["head"]["kernel"])
    assert kinds(origins) == {"head/kernel": "loaded"}
    more = {**source["encoder"], "more": normal(1, 2)}
    with pytest.raises(ConfigError, match="encoder/more"):
        initialise.load_params({**fresh, "encoder": described}, {"encoder": more})


@pytest.mark.parametrize(
    "section, message",
    [
        ({}, "give workdir or weights"),
        ({"weights": "a.npz", "workdir": "b"}, "give workdir or weights"),
        ({"weights": "vit_s15"}, r"init\.weights: vit_s15: .*known: vit_s14"),
        ({"weights": "none/a.npz"}, r"init\.weights: there is no none/a\.npz"),
        ({"workdir": "none"}, r"init\.workdir='none' has no checkpoint"),
    ],
    ids=["neither", "both", "name", "path", "run"],
)
def test_a_run_whose_source_is_not_there_ends_before_it_opens_anything(
    tmp_path, monkeypatch, section, message
):
    monkeypatch.setattr(experiment, "build_stream", lambda _: 1 / 0)
    section = {"rules": [["(.*)", r"\1"]], **section}
    config = tiny.config(model__init=section)
    with pytest.raises(ConfigError, match=message):
        train.train(config, tmp_path)
    assert not list(tmp_path.iterdir())
    # One that has saved, or goes on from another, reads it no more.
    config["checkpoint"]["resume"] = "another"
    with pytest.raises(ZeroDivisionError):
        train.train(config, tmp_path / "second")
    config["checkpoint"]["resume"] = ""
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        train.train(config, tmp_path)
