import gc
import json
import logging
import shutil
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from navit_jax import checkpoint, checksums, optim, records, saved_steps, sharding
from navit_jax.errors import CheckpointError, ConfigError

# A read that orbax gives up leaves coroutines behind, which complain when collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
MESH = sharding.make_mesh(2, 2, 2)
TX = optax.adam(1e-3, mu_dtype="bfloat16")


@chex.dataclass(frozen=True, mappable_dataclass=False)
class State:
    params: dict
    opt: object
    ema: dict
    key: jax.Array
    step: jax.Array


@jax.jit
def _fresh(seed):
    # Random numbers: constants compress to nothing on disk.
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "blocks": {"mlp": {"up": {"kernel": jax.random.normal(keys[0], (2, 8, 16))}}},
        "head": {"kernel": jax.random.normal(keys[1], (8, 5))},
    }
    opt = TX.update(params, TX.init(params))[1]
    ema = jax.tree.map(lambda x: 2 * x, params)
    return State(params=params, opt=opt, ema=ema, key=keys[2], step=jnp.int32(seed))


def place(state, mesh=MESH):
    shapes = jax.eval_shape(lambda: state)
    return jax.device_put(state, sharding.state_shardings(shapes, shapes.params, mesh))


def abstract(mesh=MESH):
    shapes = jax.eval_shape(_fresh, 0)
    places = sharding.state_shardings(shapes, shapes.params, mesh)
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
    )


STATES = {step: place(_fresh(step)) for step in range(1, 7)}


def save(folder, steps, **options):
    with checkpoint.Checkpoints(folder, **options) as saves:
        for step in steps:
            assert saves.save(step, STATES[step], {"position": [step, 0]})


def restore(folder, mesh=MESH):
    with checkpoint.Checkpoints(folder) as saves:
        return saves.restore(abstract(mesh))


def assert_equal(state, expected):
    assert checksums.compute(state) == checksums.compute(expected)
    plain = [jax.tree.leaves(s) for s in (state.params, expected.params)]
    for a, b in zip(*plain, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save(folder, [1, 2])
    return folder


@pytest.fixture
def folder(two_steps, tmp_path):
    """A copy, as `cp -r` makes it."""
    yield shutil.copytree(two_steps, tmp_path / "checkpoints")
    gc.collect()


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 2), (1, 1, 1)])
def test_a_state_comes_back_to_the_bit_on_any_mesh(folder, sizes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    step, state, metadata = restore(folder, mesh)
    assert (step, metadata) == (2, {"position": [2, 0]})
    assert_equal(state, STATES[2])
    assert isinstance(state, State)
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.mesh == mesh
    assert len({s.device for s in kernel.addressable_shards}) == np.prod(sizes)


def test_an_empty_folder_gives_none_and_is_created(tmp_path):
    assert restore(tmp_path / "a" / "b") is None
    assert (tmp_path / "a" / "b").is_dir()


def test_own_checkpoints_come_before_those_of_the_run_to_go_on_from(folder, tmp_path):
    own, before = tmp_path / "own", {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    for newest in (2, 1):
        with checkpoint.Checkpoints(own, resume=str(folder.parent)) as saves:
            assert saves.restore(abstract()).step == newest
            # Its step may be lower than the other run's.
            assert saves.save(1, STATES[1], {}) == (newest == 2)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_damage_in_the_run_to_go_on_from_is_passed_over_and_left_there(
    folder, tmp_path, caplog
):
    (folder / "2/state/manifest.ocdbt").unlink()
    before = sorted(folder.rglob("*"))
    with checkpoint.Checkpoints(tmp_path / "own", resume=str(folder.parent)) as saves:
        assert saves.restore(abstract()).step == 1
    assert "CHECKPOINT DAMAGED: step 2" in caplog.text
    assert sorted(folder.rglob("*")) == before


def test_a_folder_without_checkpoints_is_nothing_to_go_on_from(tmp_path):
    with (
        checkpoint.Checkpoints(tmp_path / "own", resume=str(tmp_path)) as saves,
        pytest.raises(ConfigError, match=r"checkpoint\.resume='.*' has no checkpoint"),
    ):
        saves.restore(abstract())
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


FILES = [
    "_CHECKPOINT_METADATA", "commit_success.txt", "run/run.json",
    "run/commit_success.txt", "state/_METADATA", "state/_sharding",
    "state/manifest.ocdbt", "state/commit_success.txt", "state/array_metadatas/*",
    "state/d/*", "state/ocdbt.process_0/manifest.ocdbt", "state/ocdbt.process_0/d/*",
]  # fmt: skip


def files(folder, pattern):
    return sorted((folder / "2").glob(pattern), key=lambda path: -path.stat().st_size)


def flip(path, seed):
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


DAMAGE = {
    "flipped": lambda path: flip(path, 0),
    "flipped elsewhere": lambda path: flip(path, 1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_after_any_damage_to_a_file_what_is_restored_is_what_was_saved(
    folder, pattern, damage, caplog
):
    if not files(folder, pattern):
        pytest.skip(f"this version of orbax writes no {pattern}")
    DAMAGE[damage](files(folder, pattern)[0])
    step, state, metadata = restore(folder)
    assert metadata == {"position": [step, 0]}
    assert_equal(state, STATES[step])
    if step == 1:
        assert "CHECKPOINT DAMAGED: step 2" in caplog.text
        assert (folder / "2.damaged").is_dir()
        # The step is free again.
        save(folder, [2])
        assert restore(folder).step == 2
    elif pattern in ("run/run.json", "state/d/*", "state/manifest.ocdbt"):
        assert damage.startswith("flipped"), "the damage went unseen"


def test_a_flip_that_orbax_does_not_see_is_found_by_its_checksum(tmp_path, caplog):
    shape = {"params": {"kernel": jax.ShapeDtypeStruct((200, 300), jnp.float32)}}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shape
    )
    states = [{"params": {"kernel": jax.random.normal(jax.random.key(i), (200, 300))}}
              for i in range(2)]  # fmt: skip
    with checkpoint.Checkpoints(tmp_path) as saves:
        for step, state in enumerate(states, 1):
            saves.save(step, state, {})
    path = files(tmp_path, "state/ocdbt.process_0/d/*")[0]
    data = path.read_bytes()
    unseen = 0
    for seed in range(4):
        path.write_bytes(data)
        flip(path, seed)
        caplog.clear()
        with checkpoint.Checkpoints(tmp_path) as saves:
            step, state, _ = saves.restore(wanted)
        if step == 1:
            (tmp_path / "2.damaged").rename(tmp_path / "2")
            unseen += "the checksum of params/kernel differs" in caplog.text
        np.testing.assert_array_equal(
            state["params"]["kernel"], states[step - 1]["params"]["kernel"]
        )
    assert unseen, "orbax has learnt to see flips: the checksums may go"


def test_a_flip_in_the_record_is_found_by_its_digest(folder, caplog):
    path = folder / "2/run/run.json"
    path.write_text(
        path.read_text().replace('"position": [2, 0]', '"position": [3, 0]')
    )
    with checkpoint.Checkpoints(folder) as saves:
        assert saves.restore(abstract()).metadata == {"position": [1, 0]}
        assert "the digest of the record" in caplog.text
        # Its step is free again for the run that goes on.
        assert saves.save(2, STATES[2], {"position": [2, 0]})
    assert restore(folder).step == 2


def test_no_whole_checkpoint_is_an_error_and_nothing_is_moved(folder):
    for step in (1, 2):
        (folder / str(step) / "run/run.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints.*\[2, 1\]"):
        restore(folder)
    assert saved_steps.find(folder) == [1, 2]
    assert CheckpointError.exit_code == 5


def test_a_newer_format_is_refused_instead_of_going_back(folder):
    path = folder / "2/run/run.json"
    record = json.loads(path.read_text()) | {"format": records.FORMAT + 1}
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="format 2, newer than 1"):
        restore(folder)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda p: p["head"].update(kernel=p["blocks"]["mlp"]["up"]["kernel"]),
         r"head/kernel as float32 \[8, 5\], the config asks for .* \[2, 8, 16\]"),
        (lambda p: p.update(hed=p.pop("head")),
         "has no params/hed/kernel.*did you mean 'params/head/kernel'"),
    ],
    ids=["shape", "name"],
)  # fmt: skip
def test_another_model_is_a_config_error_naming_the_leaf(folder, change, match):
    wanted = abstract()
    change(wanted.params)
    with (
        checkpoint.Checkpoints(folder) as saves,
        pytest.raises(ConfigError, match=match),
    ):
        saves.restore(wanted)
    assert saved_steps.find(folder) == [1, 2]


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = place(_fresh(9))
    expected = checksums.compute(state)
    with checkpoint.Checkpoints(tmp_path) as saves:
        assert saves.save(9, state, {})
        scramble = jax.jit(lambda s: jax.tree.map(
            lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x * 0, s
        ), donate_argnums=0)  # fmt: skip
        jax.block_until_ready(scramble(state))
        assert checksums.compute(saves.restore(abstract()).state) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_never_the_newest(tmp_path, bad, caplog):
    save(tmp_path, [1])
    state = STATES[2]
    params = state.params | {"head": {"kernel": jnp.full((8, 5), bad)}}
    with checkpoint.Checkpoints(tmp_path) as saves:
        assert not saves.save(2, state.replace(params=params), {})
    assert "Step 2 is not saved: not finite: params/head/kernel" in caplog.text
    assert restore(tmp_path).step == 1


def test_a_step_that_is_there_is_not_saved_again(folder, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    with checkpoint.Checkpoints(folder) as saves:
        assert not saves.save(2, STATES[3], {})
        assert not saves.save(1, STATES[3], {})
    assert "Step 1 is not saved: step 2 is there" in caplog.text
    assert_equal(restore(folder).state, STATES[2])


METRICS = {1: np.nan, 2: 0.9, 3: 0.4, 4: 0.2, 5: None, 6: 0.3}


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"keep": 2}, [5, 6]),
        ({"keep": 1, "keep_period": 2}, [2, 4, 6]),
        ({"keep": 1, "best": "eval/accuracy"}, [2, 6]),
        ({"keep": 2, "best": "eval/accuracy", "best_mode": "min"}, [4, 5, 6]),
        ({"keep": 1, "best": "eval/other"}, [6]),
    ],
)
def test_checkpoints_are_kept_by_count_period_and_best(tmp_path, options, kept):
    for steps in ([1, 2, 3], [4, 5, 6]):
        # Opened again half-way: the scores of the first three are read from disk.
        with checkpoint.Checkpoints(tmp_path, **options) as saves:
            for step in steps:
                value = METRICS[step]
                metrics = {} if value is None else {"eval/accuracy": value}
                saves.save(step, STATES[step], {}, metrics)
    assert saved_steps.find(tmp_path) == kept


def test_parameters_alone_are_read_by_step_newest_or_best(tmp_path):
    with checkpoint.Checkpoints(tmp_path, best="eval/accuracy") as saves:
        for step, score in [(1, 0.3), (2, 0.9), (3, 0.5)]:
            saves.save(step, STATES[step], {"n": step}, {"eval/accuracy": score})
    for wanted, step in [(None, 3), ("best", 2), (1, 1)]:
        restored = checkpoint.restore_params(tmp_path, wanted)
        assert (restored.step, restored.metadata) == (step, {"n": step})
        jax.tree.map(np.testing.assert_array_equal, restored.state, STATES[step].params)
    ema = checkpoint.restore_params(
        tmp_path,
        subtree="ema",
        shardings=lambda p: sharding.state_shardings(p, p, MESH),
    ).state
    jax.tree.map(np.testing.assert_array_equal, ema, STATES[3].ema)
    assert ema["head"]["kernel"].sharding.mesh == MESH


def test_frozen_parameters_are_their_own_mean_and_older_checkpoints_still_go_on(
    tmp_path,
):
    # As of before: a mean of all, that of the frozen head its parameters.
    state = STATES[1].replace(ema={**STATES[1].ema, "head": STATES[1].params["head"]})
    kept = state.replace(ema={"blocks": state.ema["blocks"]})
    for step, saved in enumerate((state, kept), 1):
        with checkpoint.Checkpoints(tmp_path / str(step)) as saves:
            saves.save(step, saved, {})
        mean = checkpoint.restore_params(tmp_path / str(step), subtree="ema").state
        chex.assert_trees_all_equal(mean, state.ema)
        chex.assert_trees_all_equal(optim.fill_ema(saved.ema, saved.params), state.ema)
        whole = abstract()
        wanted = whole.replace(ema={"blocks": whole.ema["blocks"]})
        with checkpoint.Checkpoints(tmp_path / str(step)) as saves:
            chex.assert_trees_all_equal(saves.restore(wanted).state, kept)


@pytest.mark.parametrize(
    "step, subtree, match",
    [
        (7, "params", r"no whole checkpoint for step=7; it has the steps \[1, 2\]"),
        ("best", "params", "no whole checkpoint for step='best'"),
        (None, "weights", "holds no 'weights'; it holds .*'ema'"),
    ],
)
def test_parameters_that_are_not_there_are_named(two_steps, step, subtree, match):
    with pytest.raises(CheckpointError, match=match):
        checkpoint.restore_params(two_steps, step, subtree)


def test_reading_parameters_passes_over_damage_and_changes_nothing(folder, caplog):
    (folder / "2/state/manifest.ocdbt").unlink()
    before = sorted(folder.rglob("*"))
    assert checkpoint.restore_params(folder).step == 1
    assert "CHECKPOINT DAMAGED" in caplog.text
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(CheckpointError, match="are damaged"):
        checkpoint.restore_params(folder, 2)


def test_leftovers_of_an_interrupted_save_are_removed(folder):
    leftover = folder / "3.orbax-checkpoint-tmp"
    (leftover / "state").mkdir(parents=True)
    (leftover / "state" / "d").write_text("half")
    assert restore(folder).step == 2
    assert not leftover.exists()
    save(folder, [3])
    assert restore(folder).step == 3


def test_a_full_disk_is_an_error_at_the_next_call_and_old_steps_stay(folder, full_at):
    big = {"params": {"kernel": jax.random.normal(jax.random.key(0), (400, 400))}}
    full_at(100_000)
    saves = checkpoint.Checkpoints(folder)
    # It shows at once, or when the save in the background is waited for.
    with pytest.raises(CheckpointError, match=r"step 3.*File too large(.|\n)*\[1, 2\]"):
        _ = saves.save(3, big, {}) and saves.save(4, big, {})
    full_at(-1)
    # The run may go on when there is room again.
    assert saves.save(4, STATES[4], {"position": [4, 0]})
    saves.close()
    assert restore(folder).step == 4
    assert saved_steps.find(folder) == [1, 2, 4]


def test_a_save_that_failed_is_not_forgotten_at_the_end(folder, full_at):
    big = {"params": {"kernel": jax.random.normal(jax.random.key(0), (400, 400))}}
    full_at(100_000)
    with (
        pytest.raises(CheckpointError, match="saving step 3"),
        checkpoint.Checkpoints(folder) as saves,
    ):
        saves.save(3, big, {})


@pytest.mark.parametrize(
    "options, match",
    [({"keep": 0}, "keep=0 must be 1"), ({"best_mode": "top"}, "best_mode='top'")],
)
def test_an_impossible_option_is_refused(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        checkpoint.Checkpoints(tmp_path, **options)


def test_a_folder_that_can_not_be_written_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can not be written"):
        checkpoint.Checkpoints(tmp_path / "file" / "checkpoints")


KILLED = """
import sys, time
import jax
from navit_jax import checkpoint
def state(step):
    key = jax.random.key(step)
    return {"params": {"kernel": jax.random.normal(key, (1000, 3000))}}
with checkpoint.Checkpoints(sys.argv[1]) as saves:
    last = saves.restore(jax.eval_shape(state, 0))
    print("from", last.step if last else 0, flush=True)
    for step in range(last.step + 1 if last else 1, 100):
        saves.save(step, jax.block_until_ready(state(step)), {"n": step})
        print("saved", step, flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_time_goes_on_from_a_whole_checkpoint(tmp_path):
    shape = {"params": {"kernel": jax.ShapeDtypeStruct((1000, 3000), jnp.float32)}}
    before = 0
    for delay in (0.0, 0.02, 0.05, 0.1, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == f"from {before}\n".encode()
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        with checkpoint.Checkpoints(tmp_path) as saves:
            step, state, metadata = saves.restore(
                jax.tree.map(lambda s: jax.ShapeDtypeStruct(
                    s.shape, s.dtype,
                    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
                ), shape)
            )  # fmt: skip
        assert step >= before + 2
        assert metadata == {"n": step}
        expected = jax.random.normal(jax.random.key(step), (1000, 3000))
        np.testing.assert_array_equal(state["params"]["kernel"], expected)
        before = step
