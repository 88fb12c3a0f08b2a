"""Connects the processes of a run before JAX starts its devices."""

import threading
import warnings

import jax

from rezero_jax.errors import UserError, first_line
from rezero_jax.processes import Lost

WAIT = 300  # seconds within which all processes of a run must connect
HEARTBEAT = 30  # seconds after which an unresponsive process counts as lost


def connect(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    wait: float = WAIT,
) -> None:
    """Connects the processes of the run.

    Without arguments, the processes of a TPU slice, a Slurm step or an indexed Kubernetes job find
    each other automatically; elsewhere, and with num_processes=1, the process runs alone.

    If a process is later unresponsive for HEARTBEAT seconds, JAX aborts the others (SIGABRT).

    Args:
      coordinator: host:port of process 0, which all processes can reach.
      process_id: 0 .. num_processes - 1, different in each process.
      num_processes: number of processes.
      wait: seconds within which all processes must connect.

    Raises:
      UserError: the arguments contradict each other, or a cluster's processes cannot be found.
      Lost: not all processes connected in time; end this process, because JAX will abort it within
        a minute.
    """
    if num_processes == 1:
        return
    is_given = _are_given(coordinator, process_id, num_processes)
    # JAX's preemption service would otherwise intercept SIGTERM before the training loop.
    jax.config.update("jax_enable_preemption_service", False)
    errors: list[Exception] = []

    def start() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=int(wait) + 60,  # JAX would abort without an error message
                heartbeat_timeout_seconds=HEARTBEAT,
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=start, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a Kubernetes pod need not belong to a job
        thread.start()
        thread.join(wait)
    if thread.is_alive():
        where = f" at {coordinator}" if is_given else ""
        raise Lost(
            f"not all other processes of this run connected{where} within {wait:g} s; start the "
            "same command on every host (with a different --process_id each, if you give one), or "
            "give --num_processes=1 to run on one host alone"
        )
    if errors:
        no_cluster = isinstance(errors[0], ValueError)
        has_started = "must be called before" in str(errors[0])  # JAX is already initialised
        if is_given or not (no_cluster or has_started):
            raise UserError(
                f"cannot connect to the other processes of this run ({first_line(errors[0])}); "
                "check that process 0 runs at the address of --coordinator, or give "
                "--num_processes=1 to run alone"
            ) from errors[0]


def _are_given(coordinator: str | None, process_id: int | None, num_processes: int | None) -> bool:
    """Whether the three flags are given; raises UserError if they contradict each other."""
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
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476")
    return True
