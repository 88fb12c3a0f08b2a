"""What the wall time of a run goes into, and how fast it is."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

# What the wall time of a run goes into, over all its starts. "start" is the time before the first
# dispatch: imports, data, restoring. "lost" is that of processes that were killed, since the
# checkpoint from which the run resumed, as far as their lines tell. "update" is all the rest.
TIMES = ("update", "start", "compilation", "data", "evaluation", "checkpoint", "lost")
PAUSES = ("evaluation", "checkpoint")  # what training waits for, left out of its rates
WINDOW = 5.0  # seconds of training over which the rate of examples is taken
SILENCE = 20.0  # seconds without a line after which one is said


class Clock:
    """What the wall time of a run went into, and the rate of examples while training.

    Args:
      began: time.perf_counter() when this start of the run began.
      times: those saved with the checkpoint from which it resumes, see TIMES.
      recorded: wall seconds of the earlier starts, as far as the workdir tells.
    """

    def __init__(
        self, began: float, times: dict[str, float] | None = None, recorded: float = 0.0
    ) -> None:
        saved = dict.fromkeys(TIMES, 0.0) | (times or {})
        kept = sum(saved.values())
        self._before = max(recorded, kept)
        self._began = began
        # All but the updates, whose time is the rest.
        self._times = {what: seconds for what, seconds in saved.items() if what != "update"}
        self._times["lost"] += self._before - kept
        self.spent: dict[str, float] = {}  # seconds since the last lap
        self.restart()
        self.add("start", time.perf_counter() - began)

    def restart(self) -> None:
        """Starts the rate anew."""
        self._started = self._lapped = self._spoke = time.perf_counter()
        self.rate = 0.0  # examples per second up to the last lap
        self._examples, self._busy = 0, 0.0  # since the start; seconds without the pauses
        self._laps = deque([(0.0, 0)])  # `_busy` and `_examples` at the laps of the last WINDOW

    def count(self, examples: int) -> None:
        self._examples += examples

    def lap(self) -> dict[str, float]:
        """Sets `rate`, and returns the seconds spent on each kind of work since the last lap.

        The rate spans at least WINDOW seconds once so many have passed: reports come in bursts,
        and there may be next to no time between two of them.
        """
        now, spent = time.perf_counter(), self.spent
        pauses = sum(seconds for what, seconds in spent.items() if what in PAUSES)
        self._busy += max(now - self._lapped - pauses, 1e-9)
        while len(self._laps) > 1 and self._busy - self._laps[1][0] >= WINDOW:
            self._laps.popleft()
        busy, examples = self._laps[0]
        self.rate = (self._examples - examples) / (self._busy - busy)
        self._laps.append((self._busy, self._examples))
        self._lapped, self.spent = now, {}
        return spent

    def has_been_silent(self) -> bool:
        """Whether SILENCE seconds have passed since this last returned True."""
        now = time.perf_counter()
        if now - self._spoke < SILENCE:
            return False
        self._spoke = now
        return True

    @property
    def wall(self) -> float:
        """Wall seconds of all starts of the run."""
        return self._before + time.perf_counter() - self._began

    def times(self) -> dict[str, float]:
        """Wall seconds of all starts by what they went into, see TIMES."""
        return {"update": self.wall - sum(self._times.values())} | self._times

    @property
    def elapsed(self) -> float:
        """Seconds since `restart`."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time within to what was spent on `what`; the rates leave out the PAUSES."""
        started = time.perf_counter()
        yield
        self.add(what, time.perf_counter() - started)

    def add(self, what: str, seconds: float) -> None:
        """Adds to what was spent on `what`."""
        self.spent[what] = self.spent.get(what, 0.0) + seconds
        self._times[what] += seconds
