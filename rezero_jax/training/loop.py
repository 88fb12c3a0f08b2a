"""The training loop, read from top to bottom: resume, step, write, evaluate, save, finish.

Every process of a run goes through it step by step with the others; the first one writes.
"""

import os
import signal
import time
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
from ml_collections import ConfigDict

from rezero_jax import processes
from rezero_jax.data import Dataset
from rezero_jax.errors import UserError
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.files import write_json
from rezero_jax.runs.folder import EVALUATION, TOPOLOGY, Workdir, check_config, continued
from rezero_jax.runs.metrics import MetricsWriter
from rezero_jax.training.cost import accelerator
from rezero_jax.training.load import check_saved, load_state
from rezero_jax.training.profile import Profile
from rezero_jax.training.progress import Diverged, Progress
from rezero_jax.training.trainer import Trainer

__all__ = ["Diverged", "Interrupted", "evaluate", "train"]


class Interrupted(Exception):
    """The run was told to stop and has saved its state; `signum` is the signal that said so."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped after step {step} and saved; the same command resumes from here")
        self.signum = signum


def train(
    config: ConfigDict,
    workdir: str | Path,
    dataset: Dataset | None = None,
    profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint if there is one.

    Args:
      config: see rezero_jax.config.base_config.
      workdir: the run's folder; see rezero_jax.runs.folder.
      dataset: what to train on; by default the data set that config.data names.
      profile: (first, last) updates of which a trace is written to workdir/profile, for TensorBoard
        and Perfetto; it begins and ends with the dispatches that hold them.

    Returns:
      The content of final.json.

    Raises:
      UserError: a mistake in the config or the workdir, found before the workdir is touched; or
        the workdir can no longer be written.
      Diverged: a loss, gradient or parameter is not finite; nothing is saved after it.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    # ---- Set up
    config = continued(workdir, config)
    trainer = Trainer(config, dataset) if dataset else Trainer.from_config(config)
    trainer.check_memory()
    if profile is not None and profile[1] > trainer.intervals.total:
        raise UserError(
            f"--profile_steps={profile[0]}:{profile[1]} goes beyond the last step of the run; give "
            f"two numbers from 1 to {trainer.intervals.total}"
        )
    home = Workdir(workdir, config)
    if (final := home.final) is not None:
        if processes.is_first():
            print(f"{home.folder} holds a finished run of {final['steps']} steps; nothing to do")
        return final
    try:
        return _train(trainer, home.folder, profile)
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {home.folder} any more ({error.strerror or error}); "
            "make room or repair it, and the same command resumes from the newest checkpoint"
        ) from error
    finally:
        home.abandon()  # what failed before its first update leaves nothing behind


def _train(trainer: Trainer, folder: Path, profile: tuple[int, int] | None) -> dict[str, Any]:
    """`train` in the workdir that this run holds; raises OSError where that cannot be written."""
    # ---- Resume, or begin
    config, intervals = trainer.config, trainer.intervals
    parameters = trainer.spec.parameter_count
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
    restored = checkpoints.restore(trainer.shapes)
    state, saved_progress = restored or (trainer.init(), None)
    now = int(state["step"])
    progress = Progress(
        intervals,
        parameters,
        writer=MetricsWriter(folder, now) if processes.is_first() else None,
        saved=saved_progress,
        peak_rate=_peak_rate(trainer),
        is_clipped=config.optim.clip_norm is not None,
    )
    progress.say(
        f"{parameters:,} parameters, {intervals.total:,} steps of {intervals.batch_size} examples "
        f"on {trainer.mesh.size} device(s), in {folder}"
        + (f"\nresuming after step {now:,}" if now else "")
    )
    if profile is not None and profile[1] <= now:
        progress.say(f"no trace: the updates {profile[0]} to {profile[1]} were made before")

    tracing = Profile(folder / "profile", profile if processes.is_first() else None)
    with _Signals() as signals:
        try:
            batches = trainer.batches(now)
            pending: tuple[int, int, dict[str, jax.Array]] | None = None
            stop = 0  # the signal that some process received
            while now < intervals.total:
                # ---- Step: the device computes one dispatch while the host reads the one before
                last = intervals.next_stop(now)
                tracing.begin(now, last)
                with progress.timed("data"):
                    fetched = list(islice(batches, last - now))
                started = time.perf_counter()
                state, report = trainer.dispatch(state, fetched, signals.received)
                if not progress.is_started:
                    jax.block_until_ready(report)
                    progress.start(now, last, time.perf_counter() - started)
                if pending is not None:
                    line, stop = progress.receive(*pending), int(pending[2]["stop"])
                    if intervals.is_log(pending[1]):
                        progress.write(pending[1], line)
                pending, now = (now, last, report), last
                if tracing.is_over(now):
                    jax.block_until_ready(report)
                    progress.say(tracing.end())

                # ---- Evaluate and save, where it is time
                is_eval = intervals.is_eval(now)
                if not (is_eval or stop or intervals.is_save(now)):
                    continue
                line, stop = progress.receive(*pending), stop or int(report["stop"])
                pending = None
                with progress.timed("evaluation"):
                    evaluation = trainer.evaluate(state) if is_eval else None
                if intervals.is_log(now):
                    progress.write(now, line | (evaluation or {}))
                if stop or intervals.is_save(now):
                    with progress.timed("checkpoint"):
                        checkpoints.save(now, state, progress.snapshot(), evaluation)
                if stop and now < intervals.total:
                    checkpoints.wait()
                    raise Interrupted(stop, now)

            # ---- Finish
            checkpoints.finish()
            final = progress.summary("finished", now)
            _write_final(folder, final)
        except Diverged:
            _write_final(folder, progress.summary("diverged", now))
            raise
        except jax.errors.JaxRuntimeError as error:
            processes.lose(error)
        finally:
            checkpoints.close()
            progress.close()
            tracing.close()
    return final


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """The evaluation of a run's newest good checkpoint: {"step": ..., "eval/loss": ...}.

    Only reads, also while the run trains. What is evaluated may be set otherwise than in training:
    folder.EVALUATION.

    Raises:
      UserError: there is no good checkpoint, or the workdir is of another config or structure.
    """
    check_saved(workdir)
    config = continued(workdir, config)
    trainer = Trainer.from_config(config)
    check_config(Path(workdir), config, free=TOPOLOGY + EVALUATION)
    state = load_state(workdir, trainer.shapes)
    return {"step": int(state["step"])} | trainer.evaluate(state)


def _peak_rate(trainer: Trainer) -> float | None:
    """Updates a second if the devices did nothing but multiply at their peak; None if unknown."""
    chip = accelerator()
    return chip and chip.flops * trainer.mesh.size / trainer.flops()


def _write_final(folder: Path, final: dict[str, Any]) -> None:
    if processes.is_first():
        write_json(folder / "final.json", final)


class _Signals:
    """Notes SIGINT and SIGTERM for the loop; a second one ends the process at once."""

    received: int = 0

    def __enter__(self) -> "_Signals":
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        os.write(2, b"\nstopping after this step and saving; a second signal stops at once\n")
