"""The processes of one run: how they find each other, agree, and learn that one is gone.

Every process runs the same program. The devices of all make one mesh, so that most of the code need
not know; what touches files or the terminal asks `is_first`.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rezero_jax.errors import UserError, first_line

T = TypeVar("T")

WAIT = 300  # seconds in which all processes of a run must have come
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as gone
LOST = 4  # exit status of a process that has lost another one


def join(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    wait: float = WAIT,
) -> None:
    """Finds the other processes of the run; to be called before JAX starts its devices.

    With no arguments the processes of a TPU slice, a Slurm step or an indexed Kubernetes job find
    each other. Elsewhere the process stays alone, as it does with num_processes=1.

    Args:
      coordinator: host:port of process 0, which all processes can reach.
      process_id: 0 .. num_processes - 1, another in each process.
      num_processes: how many there are.
      wait: seconds in which all must have come; else the process says so and ends (status 2).

    Raises:
      UserError: the arguments do not fit each other, or a cluster's processes cannot be found.
    """
    if num_processes == 1:
        return
    flags = {
        "--coordinator": coordinator,
        "--process_id": process_id,
        "--num_processes": num_processes,
    }
    missing = [flag for flag, value in flags.items() if value is None]
    if 0 < len(missing) < len(flags):
        raise UserError(
            f"{' and '.join(missing)} missing: a process of several needs all of --coordinator, "
            "--process_id and --num_processes"
        )
    if num_processes is not None and process_id is not None and coordinator is not None:
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id} is not in 0 .. {num_processes - 1}; number the "
                "processes from 0"
            )
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal()):
            raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476")
    # Else SIGTERM would end in JAX's own notice of a preemption, and not in the loop's.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(wait, _too_late, (coordinator, wait))
    late.daemon = True
    late.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pod of Kubernetes need not belong to a job
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=int(wait) + 60,  # which would end it without a sentence
                heartbeat_timeout_seconds=HEARTBEAT,
            )
    except ValueError as error:
        if not missing:
            raise UserError(f"cannot join the other processes ({error})") from error
        return  # no cluster: alone
    except Exception as error:
        if len(missing) == len(flags) and "must be called before" in str(error):
            return  # JAX has started: whoever did that decided
        raise UserError(
            f"cannot join the other processes of this run ({first_line(error)}); see that "
            "process 0 runs where --coordinator says, or give --num_processes=1 to run alone"
        ) from error
    finally:
        late.cancel()
    if jax.process_count() > 1:
        _tell_when_aborted()


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def warn(text: str) -> None:
    """Prints a warning, from the first process alone."""
    if is_first():
        print(f"warning: {text}", file=sys.stderr)


def from_first(work: Callable[[], Any]) -> Any:
    """Runs `work` in process 0 alone, and returns its result, plain JSON data, in every process.

    Raises:
      UserError: `work` raised it, in every process.
    """
    if jax.process_count() == 1:
        return work()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"result": work()}
        except UserError as error:
            said = {"error": str(error)}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    heard = multihost_utils.broadcast_one_to_all(text if is_first() else np.zeros(size, np.uint8))
    said = json.loads(np.asarray(heard, np.uint8).tobytes())
    if "error" in said:
        raise UserError(said["error"])
    return said["result"]


def first_in_first(work: Callable[[], T]) -> T:
    """Runs `work` in process 0 and then in the others: for files that they may or may not share.

    Raises:
      UserError: `work` raised it in process 0, or here.
    """
    done: list[T] = []
    from_first(lambda: done.append(work()))
    return done[0] if done else work()


def all_agree(here: bool) -> bool:
    """Whether `here` is True in every process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).all())


def leave() -> None:
    """Waits for every process to finish, so that none takes another's end for a failure."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def lose(error: Exception) -> NoReturn:
    """Ends a process of several after an error of JAX, which most often means another one is gone.

    It ends at once: whatever would be closed properly would wait for the other process.

    Raises:
      UserError: the memory of a device is exhausted.
      Exception: `error` itself, in a run of one process.
    """
    if "RESOURCE_EXHAUSTED" in str(error):
        raise UserError(
            f"a device is out of memory ({first_line(error)}); lower train.batch_size, raise "
            "train.accumulate, or set model.remat=full"
        ) from error
    if jax.process_count() == 1:
        raise error
    _end(LOST, f"process {jax.process_index()} cannot continue ({first_line(error)}); {_AGAIN}")


_AGAIN = (
    "most likely another process of this run has stopped or cannot be reached: start the same "
    "command on every host again, and it goes on from the newest checkpoint"
)


def _end(status: int, sentence: str) -> NoReturn:
    # JAX's threads write what they notice of a lost process until the end: not after the sentence.
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(stderr, f"\ntrain.py: {sentence}\n".encode())
    os._exit(status)


def _too_late(coordinator: str | None, wait: float) -> None:
    where = f" at {coordinator}" if coordinator else ""
    _end(
        2,
        f"the other processes of this run did not all come{where} within {wait:g} s; start the "
        "same command on every host, each with its own --process_id where you give one, or with "
        "--num_processes=1 on one host alone",
    )


def _tell_when_aborted() -> None:
    """Says a sentence when JAX aborts the process, as it does when another one's heart stops.

    From outside Python: JAX aborts in a thread of its own, while Python waits for devices.
    """
    index = jax.process_index()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(signum: int) -> None:
        _end(LOST, f"process {index} was ended by JAX; {_AGAIN}")

    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
    _kept.append(aborted)


_kept: list[Any] = []  # what C still calls must not be collected
