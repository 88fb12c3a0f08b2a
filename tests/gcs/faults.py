"""Faults between a client and its storage."""

import random
import threading
import time


class Faults:
    """Random faults of a bad network.

    One fault in 100 begins an outage, in which every connection is cut for a while.
    """

    KINDS = ("refuse", "busy", "cut the request", "lose the answer", "cut the answer", "stall")

    def __init__(self, rate: float, seed: int = 0, stall: float = 2.0):
        self._rate, self._stall = rate, stall
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._end = 0.0  # of an outage
        self.count = dict.fromkeys(self.KINDS, 0)

    def draw(self) -> str | None:
        """One of KINDS, or None."""
        with self._lock:
            if time.monotonic() < self._end:
                kind = "cut the request"
            elif self._random.random() < self._rate:
                kind = self._random.choice(self.KINDS)
                if self._random.random() < 0.01:
                    self._end = time.monotonic() + self._random.uniform(0, 10 * self._stall)
            else:
                return None
            self.count[kind] += 1
            return kind

    def stall(self) -> None:
        """Waits."""
        with self._lock:
            longest = self._stall * (10 if self._random.random() < 1 / 30 else 1)
            seconds = self._random.uniform(0, longest)
        time.sleep(seconds)
