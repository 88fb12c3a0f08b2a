"""kill -9, again and again; the run that survives must equal a run that nothing stopped."""

import dataclasses
import random
import shutil
import signal
import time
from collections.abc import Callable

from etils import epath

from rezero_jax.runs.files import is_bucket
from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.metrics import read_metrics
from tests.faults.runs import UNAVAILABLE, Process, Said, Task

KILLS_PER_RUN = 5
AIMS = ("writing", "any", "training")
PHASES = ("start-up", "training", "writing", "finishing")
POLL = 0.001  # seconds; a small checkpoint is written in some fifty of them
WRITE = 0.06  # seconds within which a kill aims at a checkpoint being written


@dataclasses.dataclass
class Kill:
    """One kill -9."""

    aim: str  # one of AIMS
    seconds: float  # age of the process
    phase: str  # what the process was doing, one of PHASES
    newest: int  # step of the newest finished checkpoint, 0 if none


@dataclasses.dataclass
class KilledRun:
    """A run that was killed and started again until it was allowed to finish."""

    family: str
    kills: list[Kill] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    # processes that ended because the bucket did not answer or another process was lost.
    outages: int = 0


def plan(rng: random.Random, count: int) -> list[list[str]]:
    """The aims of each run: a third at checkpoints being written, the others at random moments."""
    aims = [AIMS[i % len(AIMS)] for i in range(count)]
    rng.shuffle(aims)
    return [aims[i : i + KILLS_PER_RUN] for i in range(0, count, KILLS_PER_RUN)]


def half_written(workdir: epath.Path) -> set[str]:
    """Checkpoints that are being written, or were when the process was killed."""
    folder = workdir / "checkpoints"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if is_bucket(folder):  # An unfinished checkpoint has the name of a finished one.
        newest = max(saved_steps(workdir), default=0)
        return {name for name in names if name.isdigit() and int(name) > newest}
    return {name for name in names if ".orbax-checkpoint-tmp" in name}


def await_moment(
    aim: str,
    process: Process,
    workdir: epath.Path,
    seconds: tuple[float, float],
    rng: random.Random,
) -> None:
    """Returns when it is time to kill, or when the process has ended."""
    if aim != "writing":
        moment = rng.uniform(0, seconds[0] if aim == "any" else seconds[1])
        while aim == "training" and process.is_running and not process.said.has_trained:
            time.sleep(0.02)
        until = moment + (process.age if aim == "training" else 0.0)
        while process.is_running and process.age < until:
            time.sleep(min(0.05, max(until - process.age, POLL)))
        return
    patience = 10 if is_bucket(workdir) else 1
    wanted, delay = rng.randint(1, 4), rng.uniform(0, WRITE * patience)
    left_behind = half_written(workdir)
    before: set[str] = set()
    while process.is_running:
        now = half_written(workdir)
        left_behind &= now  # by the process before this one, until this one cleans up
        wanted -= len(now - left_behind - before)
        before = now - left_behind
        if wanted <= 0 and before:
            time.sleep(delay)
            return
        time.sleep(POLL * patience)


def phase(said: Said, workdir: epath.Path, steps: int) -> str:
    """What a killed process was doing."""
    if not said.has_trained:
        return "start-up"
    if half_written(workdir):
        return "writing"
    lines = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
    return "finishing" if lines and lines[-1]["step"] >= steps else "training"


def check_resumed(kills: list[Kill], said: Said) -> list[str]:
    """Problems of the process after the last kill."""
    problems = [f"checkpoint {step} called damaged after a kill" for step in said.damaged]
    resumed = said.resumed_at
    if kills and resumed is not None and resumed < kills[-1].newest:
        problems.append(f"resumed after {resumed} though {kills[-1].newest} was saved")
    return problems


def kill_run(task: Task, aims: list[str], tick: Callable[[], None]) -> list[KilledRun]:
    """Makes runs until all kills have struck; mostly one run is enough."""
    aims, runs = list(aims), list[KilledRun]()
    while aims and len(runs) < 10:
        runs.append(_kill_and_finish(task, aims, str(len(runs)), tick))
    if aims:
        runs[-1].problems.append(f"{len(aims)} kills came too late in every run")
    if not any(run.problems for run in runs):
        task.reference.family.folder(task.home).rmtree()
        shutil.rmtree(task.home, ignore_errors=True)
    return runs


def _kill_and_finish(task: Task, aims: list[str], name: str, tick: Callable[[], None]) -> KilledRun:
    """One run; removes from `aims` what has struck."""
    family, folder = task.reference.family, task.home / name
    folder.mkdir(parents=True)
    workdir = family.folder(folder) / "run"
    result = KilledRun(family.name)
    for number in range(10 * KILLS_PER_RUN):
        process = task.start(workdir, folder / f"{number}.log")
        at_start = max(saved_steps(workdir), default=0)
        if aims:
            await_moment(aims[0], process, workdir, task.reference.seconds_from(at_start), task.rng)
            age, code = process.age, process.kill(task.rng.randrange(family.processes))
        else:
            code = process.wait()
        said = process.said
        result.problems += check_resumed(result.kills, said)
        if code == 0:
            result.problems += task.differences(workdir)
            return result
        if code in UNAVAILABLE:
            result.outages += 1
            continue
        if code != -signal.SIGKILL:
            result.problems.append(f"exit status {code}; see {folder / f'{number}.log'}")
            return result
        newest = max(saved_steps(workdir), default=0)
        if newest < at_start:
            result.problems.append(f"checkpoint {at_start} is gone")
        kill = Kill(aims[0], age, phase(said, workdir, family.steps), newest)
        result.kills.append(kill)
        if kill.aim != "writing" or kill.phase == "writing":
            aims.pop(0)
            tick()
    result.problems.append("the run did not end, or no kill struck a checkpoint being written")
    return result
