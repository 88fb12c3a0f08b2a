"""Processes of one run: how they connect, agree, and notice that one of them is lost.

All processes run the same program and the devices of all of them form one mesh, so most of the
code need not know. Code that touches files or the terminal asks `is_first`.
"""

import json
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rezero_jax.errors import Unavailable, UserError, first_line

T = TypeVar("T")

WAIT = 300  # seconds within which all processes of a run must connect
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
# How XLA and CUDA's libraries report that a device has no more memory.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED")


class Lost(Unavailable):
    """Another process of the run is lost, so that this one cannot continue."""


def initialize(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    wait: float = WAIT,
) -> None:
    """Connects the processes of the run; to be called before JAX starts its devices.

    Without arguments the processes of a TPU slice, a Slurm step or an indexed Kubernetes job find
    each other automatically; elsewhere, and with num_processes=1, the process runs alone.

    A process that is silent for HEARTBEAT seconds later makes JAX abort the others (SIGABRT).

    Args:
      coordinator: host:port of process 0, which all processes can reach.
      process_id: 0 .. num_processes - 1, different in each process.
      num_processes: number of processes.
      wait: seconds within which all processes must connect.

    Raises:
      UserError: the arguments contradict each other, or a cluster's processes cannot be found.
      Lost: not all processes have connected in time. JAX aborts this process a minute later, so it
        should end.
    """
    if num_processes == 1:
        return
    is_given = _are_given(coordinator, process_id, num_processes)
    # Otherwise JAX's own notice of a preemption would catch SIGTERM before the training loop.
    jax.config.update("jax_enable_preemption_service", False)
    errors: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=int(wait) + 60,  # JAX would abort without a sentence
                heartbeat_timeout_seconds=HEARTBEAT,
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a Kubernetes pod need not belong to a job
        thread.start()
        thread.join(wait)
    if thread.is_alive():
        where = f" at {coordinator}" if is_given else ""
        raise Lost(
            f"the other processes of this run did not all connect{where} within {wait:g} s; start "
            "the same command on every host, each with its own --process_id where you give one, or "
            "with --num_processes=1 on one host alone"
        )
    if errors:
        no_cluster = isinstance(errors[0], ValueError)
        has_started = "must be called before" in str(errors[0])  # whoever started JAX has decided
        if is_given or not (no_cluster or has_started):
            raise UserError(
                f"cannot connect to the other processes of this run ({first_line(errors[0])}); "
                "check that process 0 runs where --coordinator says, or give --num_processes=1 to "
                "run alone"
            ) from errors[0]


def _are_given(coordinator: str | None, process_id: int | None, num_processes: int | None) -> bool:
    """Whether the three flags are given; raises a UserError if they do not fit each other."""
    flags = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [f"--{flag}" for flag, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return False
    if coordinator is None or process_id is None or num_processes is None:
        raise UserError(
            f"{' and '.join(missing)} missing; a run of several processes needs all of "
            "--coordinator, --process_id and --num_processes"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is not in 0 .. {num_processes - 1}; number the processes "
            "from 0"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT; give such as 10.0.0.1:8476")
    return True


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def warn(text: str) -> None:
    """Prints a warning, in the first process alone."""
    if is_first():
        print(f"warning: {text}", file=sys.stderr)


def on_first(work: Callable[[], Any]) -> Any:
    """Runs `work` in process 0 alone, and returns its result, plain JSON data, in every process.

    Raises:
      UserError: `work` raised it; raised in every process.
    """
    if jax.process_count() == 1:
        return work()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"result": work()}
        except UserError as error:
            answer = {"error": str(error), "passes": isinstance(error, Unavailable)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(text if is_first() else np.zeros(size, np.uint8))
    answer = json.loads(np.asarray(text, np.uint8).tobytes())
    if "error" in answer:
        raise (Unavailable if answer["passes"] else UserError)(answer["error"])
    return answer["result"]


def on_first_then_others(work: Callable[[], T]) -> T:
    """Runs `work` in process 0, then in the others: for files that they may or may not share.

    Raises:
      UserError: `work` raised it in process 0, or here.
    """
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
    return any(word in str(error) for word in OUT_OF_MEMORY)


def raise_cause(error: Exception) -> NoReturn:
    """Raises the cause of an error of JAX in words, if it is known, or else the error itself.

    Raises:
      UserError: the memory of a device is exhausted.
      Lost: an error of JAX in a run of several processes. Closing anything properly would wait for
        the lost process, so this one should end at once.
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
