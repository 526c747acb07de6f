"""Two processes of four devices each, on this machine, against one of eight."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import kills
import numpy as np
import pytest
import tiny
from etils import epath

from navit_jax import evaluate, experiment, reporting, train

TESTS = str(pathlib.Path(__file__).parent)
PROGRAM = """
import json, sys, jax
address, index, config, workdir, before = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(index))
from absl import flags
flags.FLAGS.mark_as_parsed()
import kills
import jax.numpy as jnp
from navit_jax import compile, evaluator, host_signals, records, train
from navit_jax.tasks.classification import Classification as Task
exec(before)
sys.exit(train.train(json.loads(config), workdir))
"""


def run_two(config, workdir, before=""):
    """Trains on two processes; returns what each said and its exit code.

    Args:
      before: A program that each runs first; it knows its `index`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROGRAM,
                address,
                str(i),
                json.dumps(config),
                str(workdir),
                before,
            ],
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": TESTS},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return said, [process.returncode for process in processes]


def told(workdir, name):
    records = reporting.read_metrics(epath.Path(workdir))
    return [r[name] for r in records if name in r]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_two_processes_train_as_one_and_one_goes_on_with_the_same_batches(
    shards, tmp_path
):
    changes = {"train__report_every": 1, "data__plan_shards": shards}
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert train.train(tiny.config(**changes, steps=6), one) == 0
    # The same learning rates: the schedule knows the length of the run.
    schedule = {"name": "constant"}
    short = tiny.config(**changes, steps=3, optim__schedule=schedule)
    whole = tiny.config(**changes, steps=6, optim__schedule=schedule)
    said, codes = run_two(short, two)
    assert codes == [0, 0], "\n".join(said)
    assert len(told(two, "train/loss")) == 3
    assert train.train(whole, two, allow_config_change=True) == 0
    assert told(two, "position") == told(one, "position")
    assert told(two, "data/images_seen") == told(one, "data/images_seen")
    reference = str(tmp_path / "reference")
    assert train.train(whole, reference) == 0
    np.testing.assert_allclose(
        told(two, "train/loss"), told(reference, "train/loss"), rtol=1e-4
    )


# Where one of the two processes is told to stop, and the only step that is saved then.
STOPS = {
    "compile.Program, 'step'": None,
    "host_signals, 'encode'": 3,
    "evaluator.Evaluator, '_run_one'": 3,
    "records, 'make'": 3,
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "unbroken"
    said, codes = run_two(judged(), workdir)
    assert codes == [0, 0], "\n".join(said)
    return workdir


def judged():
    source = {"name": "clipart", "split": "validation"}
    evals = {"validation": {"sources": {"clipart": source}, "sides": (32,)}}
    return tiny.config(evals=evals, train__report_every=1, train__evaluate_every=3)


@pytest.mark.slow
@pytest.mark.parametrize("point", STOPS)
def test_one_process_told_to_stop_takes_both_along_and_they_go_on_without_a_trace(
    point, unbroken, tmp_path
):
    before = f"if index == '1': kills.signal_at({point})"
    said, codes = run_two(judged(), tmp_path, before)
    assert codes == [42, 42], "\n".join(said)
    saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert saved == ([str(STOPS[point])] if STOPS[point] else [])
    said, codes = run_two(judged(), tmp_path)
    assert codes == [0, 0], "\n".join(said)
    kills.assert_same_runs(tmp_path, unbroken)


JUDGE = """
from navit_jax import evaluate
found = f"{workdir}/found_{index}.json"
evaluate.evaluate(workdir, ["native", 32], shots=[1], output=found)
sys.exit(0)
"""


@pytest.mark.slow
def test_two_processes_judge_together_as_one_does(unbroken):
    said, codes = run_two(judged(), unbroken, JUDGE)
    assert codes == [0, 0], "\n".join(said)
    assert not (unbroken / "found_1.json").exists()  # written by the first alone
    found = json.loads((unbroken / "found_0.json").read_text())["values"]
    one = evaluate.evaluate(unbroken, ["native", 32], shots=[1])
    assert found.keys() == one.keys()
    for name in found.keys() - {n for n in found if n.endswith("/seconds_per_image")}:
        # A guess may change by rounding: packed alike, but on other devices.
        assert found[name] == pytest.approx(one[name], abs=2e-2), name


# An image whose loss is not finite, for all that its pixels say.
SPOIL = """
own = Task._means
def spoiled(self, logits, batch):
    means = own(self, logits, batch)
    hit = (batch.image_ids[..., 1] == {image}) & batch.image_mask
    total = jnp.where(hit, jnp.nan, means["loss"].total)
    return means | {{"loss": means["loss"].replace(total=total)}}
Task._means = spoiled
"""


@pytest.mark.slow
def test_the_culprit_of_one_process_is_named_by_it_and_the_other_runs_along(tmp_path):
    config = tiny.config(steps=2, train__report_every=1)
    host, info = next(experiment.build_stream(config).batches(np.arange(8)))
    row, slot = 5, 1  # of the second process
    spoil = SPOIL.format(image=host.image_ids[row, slot, 1])
    said, codes = run_two(config, tmp_path, spoil)
    assert codes == [0, 0], "\n".join(said)
    named = {
        path.name: [line for line in path.read_text().splitlines() if "alone" in line]
        for path in tmp_path.glob("nonfinite_*.txt")
    }
    culprit = f"alone not finite: {info.keys[row][slot]}"
    assert named == {"nonfinite_step_1_0.txt": [], "nonfinite_step_1_1.txt": [culprit]}
    assert told(tmp_path, "train/nonfinite_steps") == [1, 1]
