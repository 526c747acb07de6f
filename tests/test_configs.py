import jax
import numpy as np
import pytest
import tiny

from navit_jax import compile, experiment, inheritance, paths, sharding
from navit_jax import config as config_lib
from navit_jax.data.tokenizer import DEFAULT
from navit_jax.errors import ConfigError

CONFIGS = [
    *(
        (str(p.relative_to(tiny.ROOT)),)
        for p in tiny.ROOT.glob("configs/*.py")
        if p.stem != "folder"
    ),
    ("configs/ablations/resolution.py",),
    ("configs/ablations/resolution.py", "square"),
    ("configs/ablations/resolution.py", "64"),
    ("configs/bootstrap_smoke.py", "glimpse"),
    ("configs/bootstrap_smoke.py", "long"),
    ("configs/bootstrap_smoke.py", "plain"),
    ("configs/bootstrap_smoke.py", "resized"),
    ("configs/bootstrap_smoke.py", "scratch"),
    ("configs/contrastive_long.py", "vit_s14"),
    ("configs/folder.py", "/pictures"),
    ("configs/vit_baseline.py", "full"),
    ("configs/navit_classification.py", "variant=L/14,res=56:224"),
]


@pytest.mark.parametrize("call", CONFIGS, ids=" ".join)
def test_every_config_describes_a_state_and_a_plan(call):
    config = config_lib.resolve(tiny.load(*call))
    experiment.check_sections(config)
    # Sets that are not here are stood in for: laws, sizes and shapes are the config's.
    for section in [config["data"], *config["evals"].values()]:
        for name, source in section["sources"].items():
            if source["name"] in ("tfds", "folder", "composites"):
                section["sources"][name] = {"name": "clipart", "split": "train"}
    changes = {"num_labels": 3, "rand_augment": "", "teacher": ""}
    config["data"] = {**config["data"], **changes}
    stream = experiment.build_stream(config)
    report = stream.plan.report()
    # Drawings of 25:1 exceed any table of a sensible length.
    assert report["shrunk"] <= 0.005 * report["images"]
    assert report["padding"] < 0.05
    task = experiment.build_task(config, stream.num_classes or 8)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = compile.Program(config, task, stream.example(), mesh)
    assert program.abstract.params
    assert float(program.schedule(config["steps"])) < config["optim"]["lr"]
    for name, section in config["evals"].items():
        assert list(experiment.build_eval_streams(config, section, name))


def test_a_clip_teacher_brings_its_texts_where_a_tokenizer_is_given(tmp_path):
    path, names = "configs/sparseformer_bootstrap.py", tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\nf\ng\nh\n")
    given = f"teacher=clip_b,weights=FILE,tokenizer={DEFAULT},names={names}"
    config = config_lib.resolve(tiny.load(path, given))
    experiment.check_sections(config)
    for section in [config["data"], *config["evals"].values()]:
        clipart = {"name": "clipart", "split": "validation"}
        section["sources"] = {"imagenet": clipart}
    stream = experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    shapes = jax.eval_shape(task.init, jax.random.key(0), stream.example())
    assert {"encoder", "teacher", "head", "text", "text_head", "log_scale"} == {*shapes}
    assert shapes["text"]["position_embedding"]["tables"].shape == (1, 77, 512)
    assert shapes["text_head"]["kernel"].shape == (512, 512)
    section = config["evals"]["zero_shot"]
    assert len(section["names"]) == 8
    assert list(experiment.build_eval_streams(config, section, "zero_shot"))
    with pytest.raises(ValueError, match="is for clip_"):
        tiny.load(path, f"teacher=augreg_b,tokenizer={DEFAULT}")


def test_the_plain_vit_sees_one_square_image_a_row():
    config = config_lib.resolve(tiny.load("configs/vit_baseline.py"))
    stream = experiment.build_stream(config)
    batch, _ = next(stream.batches(np.arange(8)))
    assert (batch.segment_ids == 1).all()
    assert (batch.grids == 4).all()
    assert (batch.image_mask.sum(-1) == 1).all()


@pytest.mark.parametrize("name", ["navit_classification", "navit_contrastive"])
@pytest.mark.parametrize("part", ["bogus", "variant=B", "res=64", "res=64:", "a=64:9"])
def test_an_argument_of_another_form_is_named_with_those_there_are(name, part):
    message = f"argument '{part}' is none of variant=B/16, .*res=64:256"
    with pytest.raises(ValueError, match=message):
        tiny.load(f"configs/{name}.py", f"res=32:64,{part}")
    assert tiny.load(f"configs/{name}.py", "res=32:64,variant=Ti/16,").data.tokens == 16


@pytest.mark.parametrize(
    "path, message",
    [
        ("optimm", "did you mean 'optim'"),
        ("data.tokenz", "did you mean 'tokens'"),
        ("model.widht", "did you mean 'width'"),
        ("model.positions.lenght", "did you mean 'length'"),
        ("optim.schedule.warmupp", "did you mean 'warmup'"),
        ("task.los_name", "did you mean 'loss_name'"),
        ("train.report", "did you mean 'report_every'"),
        ("mesh.fsd", "did you mean 'fsdp'"),
    ],
)
def test_an_unknown_key_fails_and_names_the_nearest(path, message):
    config = tiny.config(mesh={})
    *sections, key = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[key] = 1
    with pytest.raises(ConfigError, match=message):
        _build(config)


def _build(config):
    experiment.check_sections(config)
    experiment.train_options(config)
    mesh = config_lib.call(sharding.make_mesh, config["mesh"], "mesh")
    stream = experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    jax.eval_shape(task.init, jax.random.key(0), stream.example())
    compile.Program(config, task, stream.example(), mesh)


def test_a_name_or_a_missing_key_is_explained():
    with pytest.raises(ConfigError, match="did you mean 'factorized'"):
        _build(
            tiny.config(model__positions={"name": "factorised", "length": 8}, mesh={})
        )
    config = tiny.config(mesh={})
    del config["data"]["resolution"]
    with pytest.raises(ConfigError, match=r"data.resolution is missing"):
        _build(config)


def test_a_config_survives_json_and_differences_are_listed_by_path():
    config = tiny.config()
    assert config_lib.differences(config, config) == []
    other = tiny.config(optim__lr=0.1)
    del other["train"]
    found = config_lib.differences(config, other)
    assert ("optim.lr", 0.001, 0.1) in found
    assert ("train.report_every", 2, "unset") in found


def test_a_batch_of_more_rows_than_images_is_warned_of(caplog):
    experiment.build_stream(tiny.config(data__rows=1639))
    assert not caplog.records
    experiment.build_stream(tiny.config(data__rows=1640))
    assert "rows than there are images, 1639" in caplog.text


def test_rows_of_an_evaluation_grow_until_every_aspect_fits():
    config = tiny.config(data__tokens=256)
    source = {"clipart": {"name": "clipart", "split": "validation"}}
    section = {"sources": source, "sides": [271], "slots": 1}
    ((_, stream),) = experiment.build_eval_streams(config, section, "validation")
    assert stream.plan.tokens == 512  # a picture of 3 : 1 takes 261
    images = stream.plan.plan_window(0, 0).images
    assert not images.shrunk[images.grid.max(1) < 32].any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data__upscale": "no"}, "data.upscale='no': give True or False"),
        ({"data__flip": True}, "data.flip=True: give a number"),
        ({"data__packer": 3}, "data.packer=3: give text"),
        ({"train__accumulate": 2.5}, "accumulate=2.5: give a whole number"),
        ({"data__crop": "inception"}, "data.crop='inception': give a section"),
        ({"optim__schedule": "cosine"}, "optim.schedule='cosine': give a section"),
        ({"checkpoint": 5}, "checkpoint=5: give a section"),
    ],
)
def test_a_value_of_another_kind_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        experiment.check_sections(tiny.config(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"crop": {"name": "inception", "area_low": 0.5}},
        {"fill": True},
        {"flip": 0.5},
        {"jitter": 0.4},
        {"plan_shards": 2},
        {"resolution": {"name": "fixed", "side": 64}},
        {"token_drop": {"name": "constant", "rate": 0.5}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_set_to_judge_refuses_what_only_training_follows(change):
    config = tiny.config()
    section = {"sources": config["data"]["sources"], "sides": (64,), **change}
    with pytest.raises(ConfigError, match=rf"evals\.mine\.{next(iter(change))} has no"):
        list(experiment.build_eval_streams(config, section, "mine"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resolutoin": 1}, r"evals\.mine\.resolutoin is unknown; (?!.*resolution)"),
        ({"rows": "8"}, r"evals\.mine\.rows='8'"),
        ({"name": "retreival"}, "name='retreival': did you mean 'retrieval'"),
        ({"name": "retrieval", "templates": ["{}"]}, "templates is unknown"),
        ({"name": "zero_shot", "template": "{}"}, "did you mean 'templates'"),
        ({"name": "zero_shot", "num_labels": 2}, "num_labels is unknown"),
        ({"templates": ["{}"]}, "templates is unknown"),
        ({"sides": ()}, "give at least one"),
        ({"sides": 64}, "sides=64: give a list"),
        ({"sides": "64"}, "sides='64': give a list"),
        ({"budgets": 9}, "budgets=9: give a list"),
        *(
            ({"sides": (side,)}, f"sides: {side!r}: give pixels or 'native'")
            for side in ("Native", "64", None, True, 0, float("inf"), float("nan"))
        ),
        *(
            ({"budgets": (budget,)}, f"budgets: {budget!r}: give whole numbers")
            for budget in ("16", 2.5, 0, True)
        ),
    ],
    ids=str,
)
def test_a_set_to_judge_is_checked_before_it_is_opened(change, message):
    config = tiny.config()
    section = {"sources": config["data"]["sources"], "sides": (64,), **change}
    with pytest.raises(ConfigError, match=message):
        list(experiment.build_eval_streams(config, section, "mine"))


def test_a_set_to_judge_that_is_no_section_is_refused():
    with pytest.raises(ConfigError, match=r"config\.evals\.v=3: give a section"):
        experiment.check_sections(tiny.config(evals={"v": 3}))


TOWER = {"blocks", "norm", "class_token", "patch_embedding", "position_embedding"}
FOCUSING = {"stem", "tables", "focusing", "stages", "transition", "refocusing"}
SMOKE, FULL = "configs/bootstrap_smoke.py", "configs/sparseformer_bootstrap.py"


@pytest.mark.parametrize(
    "path, arg, own, kept",
    [
        (SMOKE, "", FOCUSING, 8),
        (SMOKE, "composites", FOCUSING, 8),
        (SMOKE, "plain", TOWER, 0),
        (SMOKE, "long", FOCUSING, 8),
        (SMOKE, "glimpse", {*FOCUSING, "glimpses/gain"}, 12),
        (SMOKE, "resized", set(), 12),
        (SMOKE, "scratch", TOWER, 0),
        (FULL, "teacher=augreg_b", FOCUSING, 8),
        (FULL, "teacher=augreg_l", FOCUSING, 16),
        (FULL, "teacher=clip_b", FOCUSING, 8),
        (FULL, "teacher=clip_l", FOCUSING, 16),
        (FULL, "", FOCUSING, 8),
    ],
)
def test_a_student_starts_with_its_teachers_last_blocks_and_all_that_is_not_its_own(
    path, arg, own, kept
):
    """Each value tells which parameter and which layer of it it came from."""
    config = config_lib.resolve(tiny.load(path, arg))
    config["data"] |= {"sources": tiny.config()["data"]["sources"], "teacher": ""}
    stream = experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    shapes = paths.flatten(
        jax.eval_shape(task.init, jax.random.key(0), stream.example())
    )
    # Of a parameter its first axis alone: that of the layers, where there are any.
    values = {
        name: 1000 * i + np.arange(*shape.shape[:1], dtype=np.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }
    rules = config["task"]["inherit"]
    found = paths.flatten(inheritance.inherit(paths.nest(values), rules))
    for name, leaf in found.items():
        part = name.removeprefix("encoder/")
        if part == name or part.startswith(tuple(own)):
            np.testing.assert_array_equal(leaf, values[name], err_msg=name)
            continue
        source = values["teacher/" + part.removeprefix("glimpses/")]
        if part.startswith("blocks/"):
            source = source[-kept:]
        np.testing.assert_array_equal(leaf, source, err_msg=name)
