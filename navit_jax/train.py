"""Trains: `python -m navit_jax.train --config=configs/smoke.py --workdir=runs/demo`.

The same command on the same folder resumes. The loop is: step, report, evaluate, save.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags, logging
from etils import epath

from navit_jax import (
    checkpoint,
    command_line,
    compile,
    culprits,
    evaluator,
    experiment,
    host_signals,
    initialise,
    optim,
    paths,
    peak_flops,
    processes,
    reporting,
    run_folder,
    sharding,
    signals,
    storage,
    tracing,
    train_flops,
    watch,
)
from navit_jax import config as config_lib
from navit_jax.batch import BatchInfo, PackedBatch
from navit_jax.data.quality import QualityLimit
from navit_jax.errors import PREEMPTED, NumericsError
from navit_jax.progress import Progress
from navit_jax.reporting import MetricWriter

SLOW_READER_SECONDS = 10.0


def train(
    config: Mapping[str, Any],
    workdir: epath.PathLike,
    *,
    take_over: bool = False,
    allow_config_change: bool = False,
    profile: tuple[int, int] | None = None,
) -> int:
    """Trains what the config says, from scratch or from where the folder's run stopped.

    Args:
      config: Resolved, as `config.resolve` gives it.
      workdir: The run's folder.
      take_over: Take the folder from a run that holds it and is known to be dead.
      allow_config_change: Resume although the config differs from the stored one.
      profile: First and last step of a profiler trace.

    Returns:
      0 when all steps are done, 42 when it saved and left because it was told to stop.

    Raises:
      ConfigError, DataError, NumericsError, CheckpointError: see errors.py.
    """
    experiment.check_sections(config)
    workdir = storage.locate(workdir)
    processes.check_same(config, workdir)
    initialise.check_begin(config, workdir)
    with (
        signals.stop_requests() as stop,
        run_folder.hold(workdir, take_over) as check_lock,
    ):
        run_folder.store_config(workdir, config, allow_config_change)
        mesh = config_lib.call(sharding.make_mesh, config.get("mesh", {}), "mesh")
        with jax.set_mesh(mesh):
            run = Run(config, workdir, mesh, stop, check_lock)
            return run.run(profile)


class Run:
    """Everything a run is made of, and its loop."""

    def __init__(
        self,
        config: Mapping[str, Any],
        workdir: epath.Path,
        mesh: jax.sharding.Mesh,
        stop: signals.StopRequest,
        check_lock: Callable[[], None],
    ):
        """Builds what the config names, and restores or initialises the state."""
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.stop, self.check_lock = stop, check_lock
        self.steps = config["steps"]
        self.options = experiment.train_options(config)
        self.stream = experiment.build_stream(config)
        sharding.rows_per_step(self.stream.plan.rows, mesh, self.options.accumulate)
        self.task = experiment.build_task(config, self.stream.num_classes)
        self.saves = config_lib.call(
            checkpoint.Checkpoints,
            config.get("checkpoint", {}),
            "checkpoint",
            folder=workdir / "checkpoints",
        )
        program = compile.Program(config, self.task, self.stream.example(), mesh)
        restored = self.saves.restore(program.abstract, self.steps)
        meta: Mapping[str, Any] = {}
        if restored:
            self.first, self.state, meta = restored
            logging.info("resuming after step %d of %d", self.first, self.steps)
            self.stream.plan.check_fingerprint(meta["fingerprint"])
        else:
            self.first, self.state = 0, program.first_state()
            logging.info("parameters:\n%s", paths.tabulate(program.abstract.params))
        self.quality = QualityLimit(self.options.bad_images, meta.get("quality", ()))
        self.step_fn = compile.tell(program.step())
        self.judge = jax.jit(
            lambda *args: self.task.metrics(*args)["loss"].total,
            out_shardings=sharding.batch_sharding(mesh),
        )
        self.position = meta.get("position")
        self.rows = sharding.local_rows(mesh, self.stream.plan.rows)
        class_names = self.stream.class_names
        run_folder.store_class_names(workdir, class_names)
        texts = experiment.open_text(config)[1] if config["data"].get("text") else None
        run_folder.store_vocabulary(workdir, texts)
        self.evaluator = evaluator.Evaluator(config, self.task, mesh, class_names)
        self.evaluator.check_name(config.get("checkpoint", {}).get("best", ""))
        self.progress = self._progress(program, meta)
        # Whether the state should have been judged, but the run was told to stop.
        self.owed = meta.get("owed", False) and not reporting.was_evaluated(
            workdir, self.first
        )

    def run(self, profile: tuple[int, int] | None = None) -> int:
        """Runs the loop, and closes what it opened however it ends."""
        trace = tracing.Trace(self.workdir / "profile", profile)
        with watch.Watch(self.workdir, self.options.hang_seconds) as self.watch:
            try:
                code = self._loop(trace)
                self.saves.close()
                return code
            finally:
                trace.stop()
                self.progress.close()

    def _loop(self, trace: tracing.Trace) -> int:
        """Steps, reports, evaluates, saves; returns the exit code."""
        # What was asked for while all was built: there is nothing new to save.
        step, stopped = self.first, self.stop.agreed()
        if self.owed and not stopped:
            self._evaluate(step)
            stopped = self.owed
        batches = self.stream.batches(self.rows, self.position)
        pending: list[tuple[int, PackedBatch, BatchInfo, Any]] = []
        while step < self.steps and not stopped:
            trace.reach(step)
            self.watch.tell(
                f"reading the images of step {step + 1}", SLOW_READER_SECONDS
            )
            host, info = next(batches)
            # The first one compiles.
            self.watch.tell(f"step {step + 1}" if step > self.first else "")
            numbers = host_signals.encode(info, self.stop.requested)
            batch, numbers = sharding.place((host, numbers), self.mesh)
            self.state, metrics = self.step_fn(self.state, batch, numbers)
            step += 1
            # Read one step late, so that the devices never wait for the host.
            pending.append((step, host, info, metrics))
            stopped = len(pending) > 1 and self._read(*pending.pop(0))
            if stopped or self._due(step, "save_every", "evaluate_every"):
                while pending:
                    stopped |= self._read(*pending.pop(0))
                # A checkpoint holds what it was judged by; who is told to stop has no
                # time to judge.
                self._save(step, self._evaluate(step, stopped))
                # Asked meanwhile: what is saved is enough, no step more.
                stopped = stopped or self.stop.agreed()
        if step == self.steps and not self.owed:
            return 0
        logging.info("told to stop: the same command goes on after step %d", step)
        return PREEMPTED

    def _due(self, step: int, *names: str) -> bool:
        every = [getattr(self.options, name) for name in names]
        return step == self.steps or any(n and step % n == 0 for n in every)

    def _read(
        self, step: int, host: PackedBatch, info: BatchInfo, metrics: Any
    ) -> bool:
        """Takes in what a finished step says; returns whether some host must stop."""
        metrics = jax.device_get(metrics)
        for name, reason in info.skipped:
            logging.warning("step %d: %s can not be used: %s", step, name, reason)
        self.quality.note(info.skipped)
        self.place = host_signals.decode(metrics["signals"])
        self.progress.add(step, info, self.place, metrics)
        if not metrics["finite"]:
            self._report_nonfinite(step, host, info, metrics)
        self.quality.check(self.place.planned, self.place.skipped)
        return self.place.stop

    def _report_nonfinite(
        self, step: int, host: PackedBatch, info: BatchInfo, metrics: Any
    ) -> None:
        """Names the images of a step that changed nothing, and ends the run if many."""

        def judge(batch: PackedBatch) -> Any:
            placed = sharding.place(batch, self.mesh)
            return sharding.fetch(self.judge(self.state.params, placed), self.mesh)

        named = culprits.find(judge, host, info)
        path = culprits.report(self.workdir, step, named, info, metrics)
        if metrics["nonfinite"] > self.options.nonfinite_steps:
            raise NumericsError(
                f"{metrics['nonfinite']} steps were not finite, the limit is "
                f"config.train.nonfinite_steps={self.options.nonfinite_steps}; lower "
                f"config.optim.lr, or look at the images in {path}"
            )

    def _evaluate(self, step: int, stopped: bool = False) -> dict[str, float]:
        """Judges the parameters if it is time; {} if not, or if asked to stop."""
        due = bool(self.evaluator.streams) and self._due(step, "evaluate_every")
        begun, values = time.monotonic(), {}
        if due and not stopped:
            params = optim.fill_ema(self.state.ema, self.state.params)
            values = self.evaluator.run(params, functools.partial(self._asked, step))
        self.owed = due and not values
        if values:
            self.progress.evaluated(step, values, time.monotonic() - begun)
        return values

    def _asked(self, step: int) -> bool:
        self.watch.tell(f"judging after step {step}")
        return self.stop.agreed()

    def _save(self, step: int, judged: Mapping[str, float]) -> None:
        self.watch.tell(f"saving step {step}")
        self.check_lock()
        metadata = {
            "position": self.place.position,
            "images_seen": self.place.images_seen,
            "fingerprint": self.stream.plan.fingerprint(),
            "progress": self.progress.state(),
            "quality": self.quality.window(),
            "environment": run_folder.environment(),
            "owed": self.owed,
        }
        self.saves.save(step, self.state, metadata, judged)

    def _progress(self, program: compile.Program, meta: Mapping[str, Any]) -> Progress:
        plan = self.stream.plan
        return Progress(
            writer=MetricWriter(
                self.workdir, self.first, active=jax.process_index() == 0
            ),
            steps=self.steps,
            report_every=self.options.report_every,
            rows=plan.rows,
            num_tokens=plan.tokens,
            flops=train_flops.flops_counter(self.config, program.abstract.params),
            peak_flops=peak_flops.peak_flops(jax.local_devices()[0])
            * jax.device_count(),
            state=meta.get("progress"),
        )


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and trains."""
    config, start = command_line.define_config(), processes.define_flags()
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
    take_over = flags.DEFINE_bool("take_over", False, "Take the folder from a dead run")
    allow = flags.DEFINE_bool(
        "allow_config_change", False, "Resume although the config differs"
    )
    window = flags.DEFINE_list("profile", None, "First and last step of a trace: 10,15")

    def main() -> int:
        start(workdir.value)
        return train(
            config_lib.resolve(config.value),
            workdir.value,
            take_over=take_over.value,
            allow_config_change=allow.value,
            profile=command_line.parse_window("profile", window.value),
        )

    return main


if __name__ == "__main__":
    command_line.run(define_main())
