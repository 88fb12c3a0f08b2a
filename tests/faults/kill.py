"""kill -9, again and again; the run that survives must equal a run that nothing stopped."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from rezero_jax.runs.files import is_bucket
from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.metrics import read_metrics
from tests.faults.runs import UNAVAILABLE, Process, Said, Task

KILLS_PER_RUN = 5
AIMS = ("writing", "any", "training")
POLL = 0.001  # seconds; a small checkpoint is written in some fifty of them
WRITE = 0.06  # seconds within which a kill aims at a checkpoint being written


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


def kill_run(task: Task, aims: list[str], tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Makes runs until all kills have struck; mostly one run is enough."""
    aims, runs = list(aims), list[dict[str, Any]]()
    while aims and len(runs) < 10:
        runs.append(_kill_and_finish(task, aims, str(len(runs)), tick))
    if aims:
        runs[-1]["problems"].append(f"{len(aims)} kills came too late in every run")
    if not any(run["problems"] for run in runs):
        task.reference.family.folder(task.home).rmtree()
        shutil.rmtree(task.home, ignore_errors=True)
    return runs


def _kill_and_finish(
    task: Task, aims: list[str], name: str, tick: Callable[[], None]
) -> dict[str, Any]:
    """Kills and starts one run until it ends; removes from `aims` what has struck."""
    family, folder = task.reference.family, task.home / name
    folder.mkdir(parents=True)
    workdir = family.folder(folder) / "run"
    kills, problems, outages, newest = list[str](), list[str](), 0, 0
    for number in range(10 * KILLS_PER_RUN):
        process = task.start(workdir, folder / f"{number}.log")
        at_start = max(saved_steps(workdir), default=0)
        if aims:
            await_moment(aims[0], process, workdir, task.reference.seconds_from(at_start), task.rng)
            code = process.kill()
        else:
            code = process.wait()
        said = process.said
        problems += [f"checkpoint {step} called damaged after a kill" for step in said.damaged]
        if said.resumed_at is not None and said.resumed_at < newest:
            problems.append(f"resumed after {said.resumed_at} though {newest} was saved")
        if code == UNAVAILABLE:
            outages += 1
            continue
        if code == 0:
            problems += task.differences(workdir)
            break
        if code != -signal.SIGKILL:
            problems.append(f"exit status {code}; see {folder / f'{number}.log'}")
            break
        newest = max(saved_steps(workdir), default=0)
        if newest < at_start:
            problems.append(f"checkpoint {at_start} is gone")
        kills.append(phase(said, workdir, family.steps))
        if aims[0] != "writing" or kills[-1] == "writing":
            aims.pop(0)
            tick()
    else:
        problems.append("the run did not end, or no kill struck a checkpoint being written")
    return {"family": family.name, "kills": kills, "problems": problems, "outages": outages}
