"""The training loop, from top to bottom: resume, step, write, evaluate, save, finish.

All processes of a run execute it in lockstep; only the first one writes.
"""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
from ml_collections import ConfigDict

from rezero_jax import processes
from rezero_jax.data import Dataset, Text
from rezero_jax.errors import Diverged, UserError, first_line
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.files import AnyPath, Upload, folder_of, write_json, writing
from rezero_jax.runs.folder import (
    EVALUATION,
    TOPOLOGY,
    check_config,
    check_data,
    check_passed,
    continued,
    recorded_config,
    saved_steps,
)
from rezero_jax.runs.workdir import Workdir
from rezero_jax.training.cost import check_memory
from rezero_jax.training.load import state_of
from rezero_jax.training.progress import Progress
from rezero_jax.training.start import Start, lengthens, read_start
from rezero_jax.training.trainer import Metrics, Trainer
from rezero_jax.user_code import check_call, find

__all__ = ["Diverged", "Interrupted", "evaluate", "train"]


class Interrupted(Exception):
    """The signal `signum` asked the run to stop; the state is saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped after step {step} and saved; the same command resumes from here")
        self.signum = signum


def train(
    config: ConfigDict,
    workdir: AnyPath,
    dataset: Dataset | Text | None = None,
    *,
    profile: tuple[int, int] | None = None,
    began: float | None = None,
    stop: Callable[[], int] | None = None,
    metrics: Metrics | None = None,
) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint if there is one.

    Args:
      config: see rezero_jax.config.base_config.
      workdir: the run's folder; see rezero_jax.runs.workdir.
      dataset: what to train on; by default the data set that config.data names. A run on a data set
        that is passed needs it again to resume and to be evaluated.
      profile: first and last update, from 1, to trace into workdir/profile.
      began: time.perf_counter() from which the run's wall time counts; by default now.
      stop: called in each dispatch; returns the number of a signal that asked this process to stop,
        or 0. By default nothing stops the run.
      metrics: more metrics for each evaluation, see `Trainer.measure`; by default eval.metrics.

    Returns:
      The content of final.json.

    Raises:
      UserError: the config or the workdir is invalid, which is found before the workdir is touched;
        or the workdir can no longer be written, or belongs to a newer start of the run.
      Unavailable: the bucket does not answer, or another process is lost; the same call resumes.
      Diverged: a loss, gradient, parameter or evaluation is not finite; nothing is saved after it.
      Interrupted: `stop` returned a signal in any process; the state is saved.

    Examples:
      >>> from rezero_jax.config import load_config
      >>> from rezero_jax.training.loop import train
      >>> final = train(load_config("configs/mlp.py:smoke"), "runs/digits")
    """
    # ---- Set up
    began = time.perf_counter() if began is None else began
    config = continued(workdir, config)
    check_passed(workdir, dataset is not None)
    trainer = Trainer(config, dataset)
    check_memory(trainer)
    metrics = metrics or _named_metrics(config)
    if profile is not None and profile[1] > trainer.intervals.total:
        raise UserError(
            f"--profile_steps={profile[0]}:{profile[1]} goes beyond the last step of the run; give "
            f"two numbers from 1 to {trainer.intervals.total}"
        )
    data = trainer.dataset.record() | {"passed": dataset is not None}
    is_longer = processes.on_first(lambda: lengthens(workdir, trainer))
    is_new = processes.on_first(lambda: not saved_steps(folder_of(workdir)))
    start = read_start(trainer) if is_new else None
    home = Workdir(workdir, trainer.config, data, is_longer)
    try:
        if (final := home.final) is not None:
            if processes.is_first():
                steps = final["steps"]
                processes.show(
                    f"{home.folder} holds a finished run of {steps} steps; nothing to do"
                )
            return final
        folder, config = home.folder / "checkpoints", trainer.config.checkpoint
        with Checkpoints(folder, config, home.check) as checkpoints:
            stop = stop or (lambda: 0)
            return _train(trainer, home, checkpoints, start, profile, began, stop, metrics)
    finally:
        home.release()


def _train(
    trainer: Trainer,
    home: Workdir,
    checkpoints: Checkpoints,
    start: Start | None,
    profile: tuple[int, int] | None,
    began: float,
    stop: Callable[[], int],
    metrics: Metrics | None,
) -> dict[str, Any]:
    # ---- Resume, or begin
    config, intervals, folder = trainer.config, trainer.intervals, home.folder
    restored = checkpoints.restore(trainer.shapes)
    state, saved_progress = restored or (trainer.init(), None)
    if restored is None and (start := start or read_start(trainer)):
        state = start.apply(state)
        with writing(folder):
            processes.on_first(lambda: write_json(folder / "init_from.json", start.record))
    now = int(state["step"])
    progress = Progress(trainer, home, now, saved_progress, began)
    progress.say(
        f"{trainer.spec.parameter_count:,} parameters, {intervals.total:,} steps of "
        f"{intervals.batch_size} examples on {trainer.mesh.size} device(s), in {folder}"
        + (f"\nresuming after step {now:,}" if now else "")
        + (f"\n{start}" if start else "")
    )
    if config.optim.warmup_steps >= intervals.total:
        processes.warn(
            f"the run ends within its warm-up (optim.warmup_steps={config.optim.warmup_steps}, "
            f"{intervals.total} steps in all); lower optim.warmup_steps or train longer"
        )
    tracing = Profile(folder / "profile", profile or (0, 0), progress.say)
    if profile is not None and profile[1] <= now:
        progress.say(f"no trace: the updates {profile[0]} to {profile[1]} were made before")
    try:
        batches = trainer.batches(now)
        pending: tuple[int, int, dict[str, jax.Array]] | None = None
        signum = 0  # the signal that asked a process to stop, or 0
        while not progress.is_over(now):
            # ---- Step: the device computes one dispatch while the host reads the one before
            last = intervals.next_stop(now)
            tracing.begin(now, last)
            with progress.clock.timed("data"):
                fetched = list(islice(batches, last - now))
            started = time.perf_counter()
            state, report = trainer.dispatch(state, fetched, stop())
            if not progress.is_started:
                progress.start(now, last, report, started)
            if pending is not None:
                line, signum = progress.receive(*pending), int(pending[2]["stop"])
                if intervals.is_log(pending[1]):
                    progress.write(pending[1], line)
            pending, now = (now, last, report), last
            tracing.end(now, report)

            # ---- Evaluate and save, where it is due
            may_end = config.train.until_loss is not None and intervals.ends_epoch(now)
            is_due = intervals.is_eval(now) or intervals.is_save(now)
            if not (is_due or signum or may_end):
                continue
            line, signum = progress.receive(*pending), signum or int(report["stop"])
            pending, is_over = None, progress.is_over(now)
            is_eval = is_over or intervals.is_eval(now)
            with progress.clock.timed("evaluation"):
                evaluation = trainer.evaluate(state) if is_eval else None
                more = trainer.measure(state, metrics) if metrics and is_eval else {}
            if intervals.is_log(now):
                progress.write(now, line | (evaluation or {}) | more)
            if signum or is_over or intervals.is_save(now):
                with progress.clock.timed("checkpoint"):
                    progress.flush()  # a checkpoint implies that its lines are in the workdir
                    checkpoints.save(now, state, progress.snapshot(), evaluation)
            if signum and not is_over:
                raise Interrupted(signum, now)  # leaving the context waits for the save

        # ---- Finish
        with progress.clock.timed("checkpoint"):
            checkpoints.finish()
        return progress.finish("finished", now)
    except Diverged:
        progress.finish("diverged", now)
        raise
    except jax.errors.JaxRuntimeError as error:
        processes.raise_cause(error)
    finally:
        progress.close()
        tracing.close()


def evaluate(
    config: ConfigDict,
    workdir: AnyPath,
    dataset: Dataset | Text | None = None,
    step: int | None = None,
) -> dict[str, float]:
    """Evaluates a checkpoint of a run, only reading: {"step": ..., "eval/loss": ...}.

    The config fields in folder.EVALUATION may differ from the run's own. `dataset` is the data set
    that was passed to `train`, if one was. `step` is the checkpoint, by default the newest good
    one; 0 is the initial model.

    Raises:
      UserError: there is no such checkpoint, or its config, data or structure differ.

    Examples:
      >>> from rezero_jax.training.loop import evaluate
      >>> print(evaluate(load_config("configs/mlp.py:smoke"), "runs/digits")["eval/accuracy"])
    """
    config = continued(workdir, config)
    check_passed(workdir, dataset is not None)
    trainer = Trainer(config, dataset)
    check_config(workdir, trainer.config, free=TOPOLOGY + EVALUATION)
    metrics = _named_metrics(config)
    state = state_of(trainer, workdir, step)
    record = trainer.dataset.record()
    if config.data.eval_split != recorded_config(workdir).data.eval_split:
        del record["eval"]
    check_data(workdir, record)
    found = {"step": int(state["step"])} | trainer.evaluate(state)
    return found | (trainer.measure(state, metrics) if metrics else {})


def _named_metrics(config: ConfigDict) -> Metrics | None:
    """The function that eval.metrics names, if any."""
    if not (name := config.eval.get("metrics")):
        return None
    metrics = find("eval.metrics", name)
    check_call(f"eval.metrics={name!r}", metrics, "model", "batch", "losses")
    return metrics


class Profile:
    """Traces the dispatches with the updates first .. last, from 1, in the first process.

    With `steps` = (first, last) = (0, 0) it traces nothing.
    """

    def __init__(self, folder: AnyPath, steps: tuple[int, int], say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._first, self._last = steps if processes.is_first() else (0, 0)
        self._upload: Upload | None = None

    def begin(self, now: int, last: int) -> None:
        """Starts the trace if the dispatch of the updates now + 1 .. last belongs to it."""
        if self._upload is None and now < self._last and last >= self._first:
            self._upload = Upload(self._folder)
            jax.profiler.start_trace(str(self._upload.folder), create_perfetto_trace=True)

    def end(self, now: int, report: Any) -> None:
        """Writes the trace if it runs and `report` is that of its last update."""
        if self._upload is not None and now >= self._last:
            jax.block_until_ready(report)
            self.close()

    def close(self) -> None:
        """Writes the trace if it runs, and prints where it is."""
        upload, self._upload = self._upload, None
        if upload is None:
            return
        try:
            jax.profiler.stop_trace()
            upload.close()
        except Exception as error:  # A full disk; the run goes on.
            processes.warn(f"the trace cannot be written ({first_line(error)})")
            return
        self._say(
            f"trace: {self._folder} (tensorboard --logdir, or its .json.gz in ui.perfetto.dev)"
        )
