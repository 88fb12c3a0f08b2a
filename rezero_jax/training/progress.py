"""Progress reporting: checks, averages, logs and prints metrics, and accounts for wall time."""

import contextlib
import copy
import datetime
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from rezero_jax import processes
from rezero_jax.errors import Diverged
from rezero_jax.runs.files import read_json, write_json, writing
from rezero_jax.runs.metrics import MetricsWriter
from rezero_jax.runs.workdir import Workdir
from rezero_jax.training.cost import model_flops, peak_flops
from rezero_jax.training.objective import REPORTED
from rezero_jax.training.trainer import Trainer

Line = dict[str, float]

# The kinds of wall time of a run, over all its starts. "start" is the time before the first
# dispatch: imports, data, restoring. "lost" is the time of killed processes after the checkpoint
# from which the run resumed, as far as the workdir records it. "update" is all other time.
TIMES = ("update", "start", "compilation", "data", "evaluation", "checkpoint", "lost")
PAUSES = ("evaluation", "checkpoint")  # waits of training that its rates leave out
WINDOW = 5.0  # seconds of training over which examples per second are measured
SILENCE = 20.0  # seconds without a printed line after which one is printed


class Progress:
    """Metrics and messages of a run; its first process writes them to the workdir and prints them.

    In a run that resumes after `step` updates, `saved` is the `snapshot` in its checkpoint. `began`
    is time.perf_counter() when this start began. The attribute `clock` times the loop's waits.
    """

    def __init__(
        self, trainer: Trainer, home: Workdir, step: int, saved: dict[str, Any] | None, began: float
    ):
        self._trainer, self._intervals, self._home = trainer, trainer.intervals, home
        self._writer: MetricsWriter | None = None
        if processes.is_first():
            self._writer = MetricsWriter(home.folder, step, home.check)
        # Plain JSON data, saved with each checkpoint so that a resumed run reports the same.
        new = {"epoch_loss": {"sum": 0.0, "steps": 0}, "last": {}, "best": {}, "time": {}}
        self._sums: dict[str, Any] = saved or new
        peak = peak_flops(trainer)
        # Updates per second of devices that only multiply, at their peak; None if unknown.
        self._peak_rate = peak and peak / model_flops(trainer)
        recorded = read_json(home.folder / "environment.json")["seconds"]
        self.clock = Clock(began, self._sums["time"], recorded)
        self._bar: tqdm | None = None
        self._first_step = 0
        self._started = self._spoke = time.perf_counter()

    @property
    def is_started(self) -> bool:
        """Whether `start` was called."""
        return self._bar is not None

    def start(self, first: int, last: int, report: dict[str, jax.Array], dispatched: float) -> None:
        """Waits for the first dispatch, which no rate counts; starts the rates and the bar.

        The dispatch of the updates first + 1 .. last began at time.perf_counter() = `dispatched`,
        and compiled before it computed.
        """
        self.clock.add("compilation", time.perf_counter() - dispatched)
        jax.block_until_ready(report)
        seconds = time.perf_counter() - dispatched
        self.say(f"first {last - first} step(s) with compilation: {seconds:.1f} s")
        self.clock.restart()
        self._first_step, self._started = last, time.perf_counter()
        self._bar = tqdm(
            total=self._intervals.total,
            initial=last,
            unit="step",
            dynamic_ncols=True,
            # No bar where the output is closed, or a file, in which lines report progress.
            disable=not (processes.is_first() and sys.stderr and sys.stderr.isatty()),
        )

    def is_over(self, step: int) -> bool:
        """Whether the run ends with this step, the last one received: by its length or its loss."""
        return step == self._intervals.total or self._has_reached_loss(step)

    def _has_reached_loss(self, step: int) -> bool:
        """Whether an epoch ends with this step and its loss is at most train.until_loss."""
        if (until := self._trainer.config.train.until_loss) is None:
            return False
        loss = self._sums["last"].get("train/epoch_loss", math.inf)
        return self._intervals.ends_epoch(step) and loss <= until

    def receive(self, first: int, last: int, report: dict[str, jax.Array]) -> Line:
        """The line of step `last`, from the report of the updates first + 1 .. last.

        Raises Diverged if a loss, or the norm of the last gradients or parameters, is not finite.
        """
        values = {name: np.asarray(value) for name, value in report.items() if name != "stop"}
        losses = values["loss"][: last - first]
        worst = int(np.isfinite(losses).argmin())  # the first loss that is not finite, if any
        for what, value, step in (
            ("loss", losses[worst], first + worst + 1),
            ("gradient norm", values["grad_norm"], last),
            ("parameter norm", values["param_norm"], last),
        ):
            if not np.isfinite(value):
                clip = "" if self._trainer.config.optim.clip_norm is not None else "set "
                raise Diverged(
                    f"the {what} became {value} at step {step}; lower optim.learning_rate or "
                    f"{clip}optim.clip_norm, and start in a new --workdir"
                )
        if first >= self._first_step:
            self.clock.examples += (last - first) * self._intervals.batch_size
        epoch_loss = self._sums["epoch_loss"]
        for loss in losses:
            epoch_loss["sum"] += float(loss)
            epoch_loss["steps"] += 1

        line: Line = {"epoch": last * self._intervals.batch_size / self._intervals.size}
        alphas = values.pop("alphas")
        for name, value in values.items():
            is_metric = name not in REPORTED and not name.startswith("learning_rate/")
            key = f"train/{name}" if is_metric else name
            line[key] = float(value[last - first - 1] if value.ndim else value)
        line |= {f"alpha/{layer}": float(alpha) for layer, alpha in enumerate(alphas)}
        if self._intervals.ends_epoch(last):
            line["train/epoch_loss"] = epoch_loss["sum"] / epoch_loss["steps"]
            self._sums["epoch_loss"] = {"sum": 0.0, "steps": 0}
            self._sums["last"]["train/epoch_loss"] = line["train/epoch_loss"]
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {line['train/loss']:.4f}", refresh=False)
            self._bar.update(max(last - self._bar.n, 0))
        return line

    def write(self, step: int, line: Line) -> None:
        """Writes the line of `step`; prints it after an evaluation or after a long silence.

        The line also gets examples per second; seconds per update, which include the wait for data
        but neither evaluations nor saves; seconds by kind since the last line; and "seconds", the
        wall time of the run over all its starts.
        """
        spent, rate = self.clock.lap(), self.clock.rate
        times = {"examples_per_second": rate}
        if updates := rate / self._intervals.batch_size:
            times["time/step"] = 1 / updates
            if self._peak_rate:
                times["mfu"] = updates / self._peak_rate
        times |= {f"time/{kind}": seconds for kind, seconds in spent.items()}
        if self._writer is not None:
            self._writer.write(step, line | times | {"seconds": self.clock.wall})

        last, best = self._sums["last"], self._sums["best"]
        last |= {k: v for k, v in line.items() if k.startswith(("train/", "eval/", "epoch"))}
        evaluation = {k: v for k, v in line.items() if k.startswith("eval/")}
        for name, value in evaluation.items():
            pick = max if name.endswith("accuracy") else min
            best[f"best/{name}"] = pick(best.get(f"best/{name}", value), value)
        if not evaluation and time.perf_counter() - self._spoke < SILENCE:
            return
        self._spoke = time.perf_counter()
        total, done = self._intervals.total, step - self._first_step
        elapsed = time.perf_counter() - self._started
        left = round(elapsed * (total - step) / done) if done else 0
        shown = {k: v for k, v in line.items() if k == "train/epoch_loss" or k in evaluation}
        numbers = shown or {"train/loss": line["train/loss"]}
        self.say(
            f"step {step:,}/{total:,} ({step / total:.0%}), epoch {line['epoch']:.2f}: "
            + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            + f", {rate:,.0f} examples/s, {datetime.timedelta(seconds=left)} left"
        )

    def flush(self) -> None:
        """Returns when the workdir has all lines so far."""
        if self._writer is not None:
            self._writer.flush()

    def snapshot(self) -> dict[str, Any]:
        """Plain JSON data to save with a checkpoint."""
        self._sums["time"] = self.clock.times()
        return copy.deepcopy(self._sums)

    def finish(self, status: str, step: int) -> dict[str, Any]:
        """Writes final.json and returns its content."""
        sums = self.snapshot()
        times, seconds = sums["time"], sum(sums["time"].values())
        busy = times["update"] + times["data"]
        final = {
            "status": status,
            "steps": step,
            "seconds": seconds,
            "goodput": times["update"] / seconds,
            **{f"time/{kind}": spent for kind, spent in times.items()},
            "examples_per_second": step * self._intervals.batch_size / busy,
            "parameters": self._trainer.spec.parameter_count,
            **sums["last"],
            **sums["best"],
        }
        if self._trainer.config.train.until_loss is not None:
            final["reached_until_loss"] = self._has_reached_loss(step)
        if processes.is_first():
            self._home.check()
            with writing(self._home.folder):
                write_json(self._home.folder / "final.json", final)
        return final

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if processes.is_first():
            with tqdm.external_write_mode():
                processes.show(text)

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()


class Clock:
    """Wall time of a run by kind, and examples per second while it trains.

    `began` is as in `Progress`, `saved` are the seconds by kind (see TIMES) in the checkpoint from
    which the run resumes, and `recorded` the wall seconds of the earlier starts, as far as the
    workdir records them. `examples` counts those since `restart`, and `rate` is examples per second
    up to the last `lap`.
    """

    def __init__(
        self, began: float, saved: dict[str, float] | None = None, recorded: float = 0.0
    ) -> None:
        self._times = dict.fromkeys(TIMES, 0.0) | (saved or {})
        known = sum(self._times.values())
        self._began, self._before = began, max(recorded, known)
        self._times["lost"] += self._before - known
        del self._times["update"]  # the rest
        self._spent: dict[str, float] = {}  # since the last lap
        self.restart()
        self.add("start", time.perf_counter() - began)

    def restart(self) -> None:
        """Restarts the measurement of the rate."""
        self._lapped = time.perf_counter()
        self.rate, self.examples = 0.0, 0
        self._busy = 0.0  # seconds without the pauses
        self._laps = deque([(0.0, 0)])  # `_busy` and `examples` at the laps of the last WINDOW

    def lap(self) -> dict[str, float]:
        """Sets `rate` and returns the seconds by kind since the last lap.

        The rate spans at least WINDOW seconds once they have passed: reports come in bursts, and
        almost no time may pass between two of them.
        """
        now, spent = time.perf_counter(), self._spent
        pauses = sum(spent.get(kind, 0.0) for kind in PAUSES)
        self._busy += max(now - self._lapped - pauses, 1e-9)
        while len(self._laps) > 1 and self._busy - self._laps[1][0] >= WINDOW:
            self._laps.popleft()
        busy, examples = self._laps[0]
        self.rate = (self.examples - examples) / (self._busy - busy)
        self._laps.append((self._busy, self.examples))
        self._lapped, self._spent = now, {}
        return spent

    @property
    def wall(self) -> float:
        """Wall seconds of all starts of the run."""
        return self._before + time.perf_counter() - self._began

    def times(self) -> dict[str, float]:
        """Wall seconds of all starts by kind, see TIMES."""
        return {"update": self.wall - sum(self._times.values())} | self._times

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Adds the time within the context to a kind."""
        started = time.perf_counter()
        yield
        self.add(kind, time.perf_counter() - started)

    def add(self, kind: str, seconds: float) -> None:
        """Adds seconds to a kind."""
        self._spent[kind] = self._spent.get(kind, 0.0) + seconds
        self._times[kind] += seconds
