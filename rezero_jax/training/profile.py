"""A trace of some updates, for TensorBoard's profiler and for Perfetto."""

import jax

from rezero_jax.errors import UserError
from rezero_jax.runs.files import AnyPath
from rezero_jax.runs.upload import Upload


def parse_steps(text: str) -> tuple[int, int]:
    """Reads "10:20", the first and the last update to trace.

    Raises:
      UserError: it is not two numbers, the second one no smaller.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"--profile_steps={text} is not FIRST:LAST; give two numbers of updates, such as 10:20"
        )
    return int(first), int(last)


class Profile:
    """Traces the dispatches that hold the updates first .. last, once.

    Args:
      folder: where the trace goes.
      steps: (first, last), counted from 1; None traces nothing.
    """

    def __init__(self, folder: AnyPath, steps: tuple[int, int] | None):
        self._folder, self._steps = folder, steps
        self._running = False

    def begin(self, now: int, last: int) -> None:
        """Starts the trace if the dispatch that makes the updates now + 1 .. last is in it."""
        wanted = self._steps is not None and last >= self._steps[0] and now < self._steps[1]
        if wanted and not self._running:
            self._upload = Upload(self._folder)
            jax.profiler.start_trace(str(self._upload.folder), create_perfetto_trace=True)
            self._running = True

    def is_over(self, now: int) -> bool:
        """Whether the trace runs and has all its updates once `now` are made."""
        return self._running and self._steps is not None and now >= self._steps[1]

    def end(self) -> str:
        """Writes the trace; says where it is."""
        jax.profiler.stop_trace()
        self._upload.close()
        self._running, self._steps = False, None
        return f"trace: {self._folder} (tensorboard --logdir, or its .json.gz in ui.perfetto.dev)"

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._running:
            self.end()
