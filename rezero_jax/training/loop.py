"""The training loop, read from top to bottom: resume, step, record, evaluate, save, finish.

Every process of a run goes through it step by step with the others; the first one records.
"""

import os
import signal
import sys
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
from rezero_jax.runs.folder import Workdir, write_json
from rezero_jax.runs.metrics import MetricsWriter
from rezero_jax.runs.progress import Diverged, Progress
from rezero_jax.training.cost import accelerator
from rezero_jax.training.profile import Profile
from rezero_jax.training.trainer import Trainer

__all__ = ["Diverged", "Interrupted", "evaluate", "train"]


class Interrupted(Exception):
    """The run was told to stop and has saved its state; `signum` is the signal that said so."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped after step {step} and saved; the same command goes on from here")
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
    program = Trainer(config, dataset) if dataset else Trainer.from_config(config)
    home = Workdir(workdir, config)
    if (final := home.final) is not None:
        _say(f"{home.folder} holds a finished run of {final['steps']} steps; nothing to do")
        return final
    try:
        return _train(program, home.folder, profile)
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {home.folder} any more ({error.strerror or error}); "
            "make room or mend it, and the same command goes on from the newest checkpoint"
        ) from error


def _train(program: Trainer, folder: Path, profile: tuple[int, int] | None) -> dict[str, Any]:
    """`train` in the workdir that this run holds; raises OSError where that cannot be written."""
    # ---- Resume, or begin
    times, parameters = program.intervals, program.spec.parameter_count
    checkpoints = Checkpoints(folder / "checkpoints", program.config.checkpoint)
    restored = checkpoints.restore(program.shapes, warn=_warn)
    state, progress = restored or (program.init(), None)
    now = int(state["step"])
    record = MetricsWriter(folder, now) if processes.is_first() else None
    journal = Progress(times, parameters, record, progress, _peak_rate(program))
    journal.say(
        f"{parameters:,} parameters, {times.total:,} steps of {times.batch_size} examples on "
        f"{program.mesh.size} device(s), in {folder}"
        + (f"\ngoing on after step {now:,}" if now else "")
    )

    tracing = Profile(folder / "profile", profile if processes.is_first() else None)
    with _Signals() as signals:
        try:
            batches = program.batches(now)
            pending: tuple[int, int, dict[str, jax.Array]] | None = None
            stop = 0  # the signal that some process received
            while now < times.total:
                # ---- Step: the device computes one group while the host takes in the one before
                last = times.next_stop(now)
                tracing.begin(now, last)
                with journal.timed("data"):
                    fetched = list(islice(batches, last - now))
                started = time.perf_counter()
                state, report = program.train_steps(state, fetched, signals.received)
                if not journal.is_started:
                    jax.block_until_ready(report)
                    journal.start(now, last, time.perf_counter() - started)
                if pending is not None:
                    line, stop = journal.receive(*pending), int(pending[2]["stop"])
                    if times.is_log(pending[1]):
                        journal.write(pending[1], line)
                pending, now = (now, last, report), last
                if tracing.is_over(now):
                    jax.block_until_ready(report)
                    journal.say(tracing.end())

                # ---- Evaluate and save, where it is time
                is_eval = times.is_eval(now)
                if not (is_eval or stop or times.is_save(now)):
                    continue
                line, stop = journal.receive(*pending), stop or int(report["stop"])
                pending = None
                with journal.timed("evaluation"):
                    evaluation = program.evaluate(state) if is_eval else None
                if times.is_log(now):
                    journal.write(now, line | (evaluation or {}))
                if stop or times.is_save(now):
                    with journal.timed("checkpoint"):
                        checkpoints.save(now, state, journal.snapshot(), evaluation)
                if stop and now < times.total:
                    checkpoints.wait()
                    raise Interrupted(stop, now)

            # ---- Finish
            checkpoints.finish()
            final = journal.summary("finished", now)
            _write_final(folder, final)
        except Diverged:
            _write_final(folder, journal.summary("diverged", now))
            raise
        except jax.errors.JaxRuntimeError as error:
            processes.lose(error)
        finally:
            checkpoints.close()
            journal.close()
            tracing.close()
    return final


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """The evaluation of a run's newest checkpoint: {"step": ..., "eval/loss": ...}.

    What is evaluated may be set otherwise than in training: record.EVALUATION.

    Raises:
      UserError: there is no checkpoint, or the workdir is of another config.
    """
    program = Trainer.from_config(config)
    if not (Path(workdir) / "checkpoints").is_dir():
        raise UserError(f"{workdir} holds no checkpoint; train there first, or name another")
    home = Workdir(workdir, config, evaluating=True)
    checkpoints = Checkpoints(home.folder / "checkpoints", config.checkpoint)
    restored = checkpoints.restore(program.shapes, warn=_warn)
    checkpoints.close()
    if restored is None:
        raise UserError(f"{workdir} holds no good checkpoint; train there first, or name another")
    state, _ = restored
    return {"step": int(state["step"])} | program.evaluate(state)


def _peak_rate(program: Trainer) -> float | None:
    """Updates a second if the devices did nothing but multiply at their peak; None if unknown."""
    chip = accelerator()
    return chip and chip.flops * program.mesh.size / program.flops()


def _write_final(folder: Path, final: dict[str, Any]) -> None:
    if processes.is_first():
        write_json(folder / "final.json", final)


def _say(text: str) -> None:
    if processes.is_first():
        print(text)


def _warn(text: str) -> None:
    if processes.is_first():
        print(f"warning: {text}", file=sys.stderr)


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
        os.write(2, b"\nstopping after this step and saving; once more stops at once\n")
