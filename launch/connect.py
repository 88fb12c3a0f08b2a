"""Connects the processes of a run before JAX starts its devices."""

import os
import socket
import sys
import threading
import warnings

import jax

from rezero_jax.errors import UserError, first_line
from rezero_jax.processes import Lost

WAIT = 300  # seconds within which all processes of a run must connect
NOTICE = 2  # seconds after which a waiting process says how to run alone
HEARTBEAT = 30  # seconds after which an unresponsive process counts as lost
# Variables of a task in a Slurm step; together they make JAX look for the other tasks.
SLURM = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")


def connect(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    wait: float = WAIT,
) -> None:
    """Connects the processes of the run.

    Without arguments, the processes of a TPU slice, a Slurm step, Open MPI or an indexed Kubernetes
    job find each other automatically. Elsewhere, with num_processes=1, and as the only task of
    Slurm or Open MPI, the process runs alone: without a coordinator, on all devices that it sees.

    If a process is later unresponsive for HEARTBEAT seconds, JAX aborts the others (SIGABRT).

    Args:
      coordinator: host:port of process 0, which all processes can reach.
      process_id: 0 .. num_processes - 1, different in each process.
      num_processes: number of processes.
      wait: seconds within which all processes must connect.

    Raises:
      UserError: the arguments contradict each other, a cluster's processes cannot be found, or
        another program uses the port of process 0.
      Lost: not all processes connected in time; end this process, because JAX will abort it within
        a minute.
    """
    if num_processes == 1:
        return
    is_given = _are_given(coordinator, process_id, num_processes)
    is_slurm = _is_slurm()
    if not is_given and _tasks(is_slurm) == 1:
        return
    bind = None
    if coordinator is not None and coordinator.startswith(("localhost:", "127.", "[::1]:")):
        bind = coordinator  # By default JAX listens on all networks.
    number, port = process_id, (coordinator or "").rpartition(":")[2]
    if is_slurm and not is_given:
        number, port = _number("SLURM_PROCID"), _slurm_port()
    if number == 0:
        _check_port(int(port))
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
                coordinator_bind_address=bind,
                # Where all is given, JAX would still ask Kubernetes, which may refuse.
                cluster_detection_method="deactivate" if is_given and not is_slurm else None,
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=start, daemon=True)
    where = f" at {coordinator}" if is_given else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a Kubernetes pod need not belong to a job
        thread.start()
        thread.join(min(NOTICE, wait))
        if thread.is_alive():
            print(
                f"waiting up to {wait:g} s for the other processes of this run{where}; to run "
                "alone, stop this command and add --num_processes=1",
                file=sys.stderr,
                flush=True,
            )
            thread.join(max(wait - NOTICE, 0))
    if thread.is_alive():
        raise Lost(
            f"not all other processes of this run connected{where} within {wait:g} s; start the "
            "same command on every host (with a different --process_id each, if you give one), or "
            "give --num_processes=1 to run on one host alone"
        )
    if errors:
        no_cluster = isinstance(errors[0], ValueError)
        has_started = "must be called before" in str(errors[0])  # JAX is already initialised
        # JAX can only connect the pods of an indexed job.
        is_pod = "KUBERNETES_SERVICE_HOST" in os.environ and _number("JOB_COMPLETION_INDEX") is None
        if is_given or not (no_cluster or has_started or is_pod):
            raise UserError(
                f"cannot connect to the other processes of this run ({first_line(errors[0])}); "
                "check that process 0 runs at the address of --coordinator, or give "
                "--num_processes=1 to run alone"
            ) from errors[0]
    elif is_slurm and _number("SLURM_NTASKS") == _number("SLURM_STEP_NUM_NODES"):
        # JAX shows each task only the GPU with the task's number on its node.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def _number(name: str) -> int | None:
    """An environment variable, if it is a number."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def _is_slurm() -> bool:
    """Whether JAX will look for the other tasks of a Slurm step; it prefers Open MPI."""
    is_step = all(f"SLURM_{name}" in os.environ for name in SLURM)
    return is_step and "OMPI_MCA_orte_hnp_uri" not in os.environ


def _tasks(is_slurm: bool) -> int | None:
    """Number of processes that Slurm or Open MPI has started with this one; None if unknown."""
    if not is_slurm:
        return _number("OMPI_COMM_WORLD_SIZE")
    planned, started = _number("SLURM_NTASKS"), _number("SLURM_STEP_NUM_TASKS")
    if started == 1 and planned != 1:
        print(
            f"Slurm allocated {planned} tasks and started this one alone, so it trains alone; to "
            "train in all tasks, start it by srun",
            file=sys.stderr,
        )
    return started or planned


def _slurm_port() -> str:
    """Sets the coordinator's port by job and step; JAX would use one port for all steps of a job.

    JAX_COORDINATOR_PORT, which JAX reads, takes precedence.
    """
    job, step = (_number(f"SLURM_{name}_ID") or 0 for name in ("JOB", "STEP"))
    port = str(61440 + (job + step) % 4096)
    port = os.environ.setdefault("JAX_COORDINATOR_PORT", port)
    if not _is_port(port):
        raise UserError(
            f"JAX_COORDINATOR_PORT={port} is not a port; give 1024 to 65535, or unset it"
        )
    return port


def _is_port(text: str) -> bool:
    return text.isdecimal() and len(text) < 6 and 0 < int(text) < 2**16


def _check_port(port: int) -> None:
    """Raises a UserError if a program on this host listens on a port.

    JAX would share the port with another run, and abort that run.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a run that has just ended
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {port} ({error.strerror}), which may belong to "
                "another run on this host; choose another port by --coordinator, or for Slurm by "
                "JAX_COORDINATOR_PORT, or give --num_processes=1 to run alone"
            ) from None


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
            f"--process_id={process_id} is not below --num_processes={num_processes}; number the "
            "processes from 0"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and _is_port(port)):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476")
    return True
