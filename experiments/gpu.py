"""Runs what two cores cannot, the most valuable first, in a limited time on a machine with a GPU.

The stages are the command lines under [gpu] in experiments/claims.toml. When the time is over, the
running stage is stopped with all its runs saved, and nothing new starts; the same command resumes.
Small networks leave most of a GPU idle, so --jobs runs, seeds among them, share it.
"""

import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import accelerator, arguments
from experiments.jobs import ROOT, status
from experiments.summary import CLAIMS
from launch import supervisor
from launch.supervisor import Supervisor
from rezero_jax import command, devices
from rezero_jax.formatting import duration

EXAMPLES = f"""\
what would run, in which order, and for how long on an H200, then the runs:
  python -m experiments gpu --dry-run
  python -m experiments gpu

{arguments.EXIT_STATUS}"""
START = 30.0  # seconds of a run for Python, compilation and evaluations; assumed, not measured
LINE = "{:<46} {:>5} {:>9} {:>10} {:>12}  {}"


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("python -m experiments gpu", __doc__, EXAMPLES)
    arguments.add_count(parser, "minutes", "time after which nothing new starts", 30)
    arguments.add_count(parser, "jobs", "runs that share the GPU", 4)
    text = "output folder (default: runs/gpu)"
    parser.add_argument("--out", default="runs/gpu", metavar="DIR", help=text)
    text = "list the stages with their predicted time on an H200"
    parser.add_argument("--dry-run", action="store_true", help=text)
    args = parser.parse_args(argv)
    devices.use_cpu()  # leaves the GPU to the runs
    out = Path(args.out).expanduser().absolute()
    if args.dry_run:
        _print_stages(out, args.minutes * 60, args.jobs)
        return 0
    return _run(out, time.monotonic() + args.minutes * 60, args.jobs)


def _run(out: Path, end: float, jobs: int) -> int:
    """Runs one stage after another until `end`; returns the exit status."""
    failed = []
    with Supervisor() as supervised:
        for name, text in CLAIMS["gpu"].items():
            if supervised.signum or time.monotonic() >= end:
                print(f"{name}: not started", flush=True)
                continue
            words = [*shlex.split(text), f"--out={out / folder(name)}", f"--jobs={jobs}"]
            print(f"{name}: python -m experiments {shlex.join(words)}", flush=True)
            run = [sys.executable, "-m", "experiments", *words]
            stage = supervised.add(supervisor.start(run, frozenset(), cwd=ROOT))
            stopped = False
            while stage.poll() is None:
                if time.monotonic() >= end and not stopped:
                    stopped = True
                    stage.terminate()
                time.sleep(0.1)
            if stopped and stage.returncode:
                print(f"{name}: stopped, as the time is over; all its runs are saved", flush=True)
            elif stage.returncode and not supervised.signum:
                failed.append(name)
    if supervised.signum:
        return 128 + supervised.signum
    if failed:
        print(f"experiments: failed, see above: {'; '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


def folder(stage: str) -> str:
    """The folder of a stage, such as "e2-12-layers"."""
    return "-".join("".join(c if c.isalnum() else " " for c in stage.lower()).split())


def _print_stages(out: Path, seconds: float, jobs: int) -> None:
    """Prints each stage's unfinished runs, their predicted time, and what fits in `seconds`."""
    spent = 0.0
    print(LINE.format("stage", "runs", "updates", "updates", "with starts", "fits"))
    prediction = accelerator.Prediction(accelerator.GPU)
    for name, text in CLAIMS["gpu"].items():
        listed, below = accelerator.jobs_of(text)
        runs = out / folder(name) / below / "runs"
        left = [job for job in listed if not status(job, runs / job.name).is_over]
        updates, needed = prediction.total(left)
        whole = needed + START * math.ceil(len(left) / jobs)
        fits = "yes" if spent + whole <= seconds else "in part" if spent < seconds else "no"
        spent += whole
        times = (f"{updates:,}", duration(needed), duration(whole))
        print(LINE.format(name, len(left), *times, fits), flush=True)
    print(
        f"\nall: {duration(spent)}, of {duration(seconds)}. The updates of all runs one after "
        f"another, {prediction.basis}; a start takes {START:g} s, {jobs} of them at once. Learning "
        "rates beyond the first grid are not included."
    )
