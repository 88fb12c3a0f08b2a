"""Reproduces the paper's figures and tables, and compares its numbers with ours."""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from experiments import arguments, compare, coordinates, drawing, gpu, results_page, sweep
from experiments.dry_run import print_costs
from experiments.jobs import DESCRIPTIONS, Job, planned, with_seeds
from experiments.report import write_report
from experiments.results import Made, Results
from experiments.running import Stopped, run_all
from rezero_jax import command, devices
from rezero_jax.analysis.theme import themed
from rezero_jax.errors import UserError, check_choice, choose_from
from rezero_jax.runs.folder import device, environment
from rezero_jax.runs.reader import Run

# Each has measure(results, runs), which fills the results, and plot(results), which draws them.
EXPERIMENTS: Mapping[str, ModuleType] = {
    name: import_module(f"experiments.{name}") for name in DESCRIPTIONS
}
COMMANDS = {
    "compare": compare.main,
    "coordinates": coordinates.main,
    "sweep": sweep.main,
    "gpu": gpu.main,
    "results": results_page.main,
}
SCALES = ("paper", "cpu", "smoke", "gpu")
EXAMPLES = f"""\
examples:
  the time of all experiments on this machine, and the status of their runs:
    python -m experiments all --dry-run
  one figure, then all of them, two runs at a time:
    python -m experiments toy
    python -m experiments all --jobs=2 --text=book.txt

Other commands, each with its own --help: {", ".join(COMMANDS)}.

{arguments.EXIT_STATUS}"""


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return _paper(argv)
    except (UserError, Stopped) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 128 + error.signum if isinstance(error, Stopped) else 2


def _paper(argv: Sequence[str]) -> int:
    """Runs the paper's experiments; raises UserError or Stopped."""
    parser = command.parser("python -m experiments", __doc__, EXAMPLES)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, {', '.join(EXPERIMENTS)}")
    arguments.add_runs(parser)
    text = "results go to DIR/SCALE, runs to DIR/SCALE/runs (default: runs/paper)"
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help=text)
    arguments.add_count(parser, "jobs", "runs at the same time, on a CPU each on its own cores", 1)
    text = "text for Transformers (default: the standard library's)"
    parser.add_argument("--text", metavar="PATH", help=text)
    text = "list the runs with their status and time"
    parser.add_argument("--dry-run", action="store_true", help=text)
    args = parser.parse_args(argv)
    devices.use_cpu()  # leaves the accelerators to the runs
    for name in args.names:
        if name not in ("all", *EXPERIMENTS):
            raise choose_from("figure or table", name, ("all", *EXPERIMENTS))
    check_choice("scale", args.scale, SCALES)
    if args.text and args.scale == "paper":
        raise UserError("at the paper's scale the text is enwik8; leave out --text")
    if args.text and not Path(args.text).exists():
        raise UserError(f"--text={args.text} does not exist; give a file or folder")
    names = [name for name in EXPERIMENTS if "all" in args.names or name in args.names]
    jobs = {name: _jobs(name, args) for name in names}
    if args.scale == "gpu" and not all(jobs.values()):
        raise UserError("only resnet and transformer_deep have a scale gpu; choose one of these")
    if args.dry_run:
        print_costs(jobs, Path(args.out).expanduser() / args.scale / "runs")
        return 0
    return _run(jobs, args)


def _jobs(name: str, args: argparse.Namespace) -> list[Job]:
    """The runs of an experiment."""
    jobs = []
    for job in planned(name, args.scale):
        if args.text and job.load().data.name == "stdlib":
            overrides = (*job.overrides, "data.name=text", f"data.path={args.text}")
            job = job._replace(overrides=overrides)
        jobs.append(job)
    return with_seeds(jobs, name, args.scale, args.seeds)


def _run(jobs: Mapping[str, Sequence[Job]], args: argparse.Namespace) -> int:
    """Trains missing runs and writes each experiment once its runs are complete."""
    folder = Path(args.out).expanduser() / args.scale
    every = list({job.name: job for of_one in jobs.values() for job in of_one}.values())
    ended, sentences, waiting = set[str](), list[str](), dict(jobs)
    folder.mkdir(parents=True, exist_ok=True)

    def write_complete() -> None:
        for name in [n for n, needed in waiting.items() if {job.name for job in needed} <= ended]:
            _write(name, waiting.pop(name), folder, args)

    write_complete()
    for job, sentence in run_all(every, folder / "runs", args.jobs):
        if sentence:
            sentences.append(sentence)
        else:
            ended.add(job.name)
            write_complete()
    print(f"report: {write_report(folder, args.scale)}")
    for sentence in dict.fromkeys(sentences):
        print(f"experiments: {sentence}", file=sys.stderr)
    if waiting:
        print(f"experiments: incomplete, as runs failed: {', '.join(waiting)}", file=sys.stderr)
    return 2 if waiting else 0


def _write(name: str, jobs: Sequence[Job], folder: Path, args: argparse.Namespace) -> None:
    """Writes NAME.json, NAME.png and NAME.svg of an experiment with complete runs."""
    runs: dict[str, list[Run]] = {}
    for job in jobs:
        runs.setdefault(job.setting, []).append(Run.read(folder / "runs" / job.name))
    started, results = time.monotonic(), Results(name, args.scale)
    EXPERIMENTS[name].measure(results, runs)
    trained = [run for seeds in runs.values() for run in seeds]
    seconds = time.monotonic() - started + sum(run.final()["seconds"] for run in trained)
    shown = ["python", "-m", "experiments", name, f"--scale={args.scale}"]
    if args.seeds:
        shown.append(f"--seeds={args.seeds}")
    if args.text and any(text.startswith("data.path=") for job in jobs for text in job.overrides):
        shown.append(f"--text={Path(args.text).name}")
    hardware = "; ".join(dict.fromkeys(run.device for run in trained)) or device(environment())
    results.made = Made(shlex.join(shown), hardware, seconds, [job.shown for job in jobs])
    drawing.save(themed(EXPERIMENTS[name].plot)(results), folder, name)
    results.write(folder)
    write_report(folder, args.scale)
    print(f"{name}: {folder / name}.json, .png, .svg", flush=True)


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
