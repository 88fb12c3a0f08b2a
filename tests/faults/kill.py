"""kill -9, again and again, and what the run that survives it must share with an unbroken one."""

import dataclasses
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from rezero_jax.runs.files import is_bucket
from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.metrics import read_metrics
from tests.faults.runs import Process, Reference, Said

KILLS_PER_RUN = 5
AIMS = ("writing", "any", "training")
PHASES = ("start-up", "training", "writing", "finishing")
POLL = 0.001  # seconds; a small checkpoint is written in some fifty of them
WRITE = 0.06  # seconds within which a kill aims at a checkpoint being written


@dataclasses.dataclass
class Kill:
    """One kill -9 and what followed.

    Attributes:
      aim: one of AIMS.
      seconds: age of the process.
      phase: what it was doing, one of PHASES.
      recorded: the last step in metrics.jsonl.
      newest: the newest finished checkpoint, 0 if none.
      resumed: the step that the run went on after; None where the next process was killed before
        it said so, or had nothing to do.
    """

    aim: str
    seconds: float
    phase: str
    recorded: int
    newest: int
    resumed: int | None = None

    @property
    def lost(self) -> int | None:
        """Recorded steps to be made again."""
        return None if self.resumed is None else max(self.recorded - self.resumed, 0)


@dataclasses.dataclass
class KilledRun:
    """A run that was killed and started again until it was allowed to finish."""

    family: str
    kills: list[Kill] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def plan(rng: random.Random, count: int) -> list[list[str]]:
    """What to aim at, for each run: a third at checkpoints being written, two at random moments."""
    aims = [AIMS[i % len(AIMS)] for i in range(count)]
    rng.shuffle(aims)
    return [aims[i : i + KILLS_PER_RUN] for i in range(0, count, KILLS_PER_RUN)]


def half_written(workdir: epath.Path) -> set[str]:
    """Checkpoints that are being written, or were when the process was killed."""
    folder = workdir / "checkpoints"
    if is_bucket(folder):  # no object is renamed: they have the names of finished ones
        begun = [path.name for path in folder.glob("*") if path.name.isdigit()]
        newest = max(saved_steps(workdir), default=0)
        return {name for name in begun if int(name) > newest}
    return {path.name for path in folder.glob("*.orbax-checkpoint-tmp*")}


def await_moment(
    aim: str,
    process: Process,
    workdir: epath.Path,
    seconds: tuple[float, float],
    rng: random.Random,
) -> None:
    """Returns when it is time to kill, or when the process has ended.

    Args:
      aim: "any": from the start of the process to its end, most of which may go into starting;
        "training": from its first updates to the end; "writing": in one of the first checkpoints.
      process: the one to kill.
      workdir: its folder.
      seconds: what all of it should take, and the part after the first updates.
      rng: draws the moment.
    """
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
    if half_written(workdir) and said.has_trained:
        return "writing"
    if not said.has_trained:
        return "start-up"
    return "finishing" if recorded(workdir) >= steps else "training"


def recorded(workdir: epath.Path) -> int:
    """The last step in metrics.jsonl."""
    if not (workdir / "metrics.jsonl").exists():
        return 0
    lines = read_metrics(workdir)
    return int(lines[-1]["step"]) if lines else 0


def check_resumed(kills: list[Kill], said: Said) -> list[str]:
    """Notes on the last kill where the process after it went on; what is wrong with that."""
    problems = [f"checkpoint {step} called damaged after a kill" for step in said.damaged]
    if said.has_traceback:
        problems.append("traceback")
    if kills and said.resumed_at is not None:
        kills[-1].resumed = said.resumed_at
        if said.resumed_at < kills[-1].newest:
            problems.append(f"went on after {said.resumed_at} though {kills[-1].newest} was saved")
    return problems


def kill_run(
    reference: Reference,
    aims: list[str],
    home: Path,
    cache: epath.Path,
    rng: random.Random,
    compare: Callable[[epath.Path, epath.Path], list[str]],
    tick: Callable[[], None],
) -> list[KilledRun]:
    """Runs with these kills, one after the other until all are made; mostly it is one run.

    Args:
      reference: the run that nothing stopped.
      aims: of the kills, as `plan` makes them.
      home: for the runs' folders and output; removed if there are no problems.
      cache: folder of what JAX compiled; where it does not exist yet, a kill can strike while JAX
        compiles or writes there.
      rng: draws the moments.
      compare: what differs between two workdirs.
      tick: called after each kill that counts.
    """
    aims, runs = list(aims), list[KilledRun]()
    while aims and len(runs) < 10:
        folder = home / str(len(runs))
        folder.mkdir(parents=True)
        runs.append(_kill_and_finish(reference, aims, folder, cache, rng, compare, tick))
    if aims:
        runs[-1].problems.append(f"{len(aims)} kills came too late in every run")
    if not any(run.problems for run in runs):
        if reference.family.storage:
            reference.family.folder(home).rmtree()
        shutil.rmtree(home)
    return runs


def _kill_and_finish(
    reference: Reference,
    aims: list[str],
    folder: Path,
    cache: epath.Path,
    rng: random.Random,
    compare: Callable[[epath.Path, epath.Path], list[str]],
    tick: Callable[[], None],
) -> KilledRun:
    """One run; strikes from `aims` what it has hit."""
    family = reference.family
    workdir = family.folder(folder) / "run"
    result = KilledRun(family.name)
    for number in range(10 * KILLS_PER_RUN):
        process = Process(family, workdir, folder / f"{number}.log", cache)
        at_start = max(saved_steps(workdir), default=0)
        if aims:
            await_moment(aims[0], process, workdir, reference.seconds_from(at_start), rng)
            age, code = process.age, process.kill(rng.randrange(family.processes))
        else:
            code = process.wait()
        said = process.said
        result.problems += check_resumed(result.kills, said)
        if code == 0:
            result.problems += compare(workdir, reference.workdir)
            return result
        if code != -9:
            result.problems.append(f"exit status {code}; see {folder / f'{number}.log'}")
            return result
        newest = max(saved_steps(workdir), default=0)
        if newest < at_start:
            result.problems.append(f"checkpoint {at_start} is gone")
        kill = Kill(aims[0], age, phase(said, workdir, family.steps), recorded(workdir), newest)
        result.kills.append(kill)
        if kill.aim != "writing" or kill.phase == "writing":
            aims.pop(0)
            tick()
    result.problems.append("no kill struck a checkpoint being written")
    return result
