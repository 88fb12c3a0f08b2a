"""Processes of one run: how they agree, and notice that one of them is lost.

All processes run the same program on one mesh of all their devices, so that only code that touches
files or the terminal needs this module.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rezero_jax.errors import Unavailable, UserError, first_line, printable

T = TypeVar("T")


class Lost(Unavailable):
    """Another process of the run is lost, so that this one cannot continue."""


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def show(text: str, file: Any = None) -> None:
    """Prints a line, by default to stdout; does nothing if the terminal or the reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file, flush=True)


def warn(text: str) -> None:
    """Prints a warning, in the first process alone."""
    if is_first():
        show(f"warning: {printable(text)}", sys.stderr)


def on_first(work: Callable[[], Any]) -> Any:
    """Runs `work` in process 0 alone; every process returns its result, plain JSON data.

    A UserError of `work` is raised in every process.
    """
    if jax.process_count() == 1:
        return work()
    result, error, passes = None, None, False
    if is_first():
        try:
            result = work()
        except UserError as raised:
            error, passes = str(raised), isinstance(raised, Unavailable)
    text = np.frombuffer(json.dumps((result, error, passes)).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(text if is_first() else np.zeros(size, np.uint8))
    result, error, passes = json.loads(np.asarray(text, np.uint8).tobytes())
    if error is not None:
        raise (Unavailable if passes else UserError)(error)
    return result


def on_first_then_others(work: Callable[[], T]) -> T:
    """Runs `work` in process 0, then in the others: for files that they may or may not share."""
    done: list[T] = []
    on_first(lambda: done.append(work()))
    return done[0] if done else work()


def agree(here: bool) -> bool:
    """Whether `here` is True in every process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).all())


def shutdown() -> None:
    """Waits until every process has finished, so that none mistakes another's end for a failure."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX means that a device has no more memory."""
    words = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED")  # of XLA and CUDA's libraries
    return any(word in str(error) for word in words)


def raise_cause(error: Exception) -> NoReturn:
    """Raises the cause of an error of JAX in words, if it is known, or else the error itself.

    Raises:
      UserError: the memory of a device is exhausted.
      Lost: an error of JAX in a run of several processes. The process should end at once: closing
        anything properly would wait for the lost process.
    """
    if is_out_of_memory(error):
        raise UserError(
            f"a device is out of memory ({first_line(error)}); raise train.accumulate, lower "
            "train.batch_size or eval.batch_size, or set model.remat=full or "
            "mesh.fully_sharded=True"
        ) from error
    is_of_jax = isinstance(error, RuntimeError) or "Gloo" in str(error)  # at times a ValueError
    if jax.process_count() == 1 or not is_of_jax:
        raise error
    raise Lost(
        f"process {jax.process_index()} cannot continue ({first_line(error)}), most likely because "
        "another process of this run has stopped, and has said why, or cannot be reached; start "
        "the same command on every host again, and it resumes from the newest checkpoint"
    ) from error
