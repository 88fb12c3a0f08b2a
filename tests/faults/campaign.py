"""Kills training and damages its checkpoints, many times, and checks that nothing is lost.

(a) kill -9 of `train.py`: a third at random moments from the start of the process to its end, a
third at random moments while it trains, a third while it writes a checkpoint. The same command is
started again, up to five kills in a row before a run may finish. It must go on from the newest
finished checkpoint, and end with the bits of a run that nothing stopped: its state, metrics.jsonl,
TensorBoard's scalars, final.json and the checkpoints it keeps.

(b) Damaged checkpoints. A run must either set the checkpoint aside, with a warning that names it,
and go on from the one before; or the damage is harmless: what is restored is, to the bit, what was
saved. It must end with the same bits too.

The runs are small networks of each family, on one machine's CPU. With --storage=gs their folders
lie in a bucket, which a server on this machine has, and requests to it fail at random; with
--processes=N each run has N processes, of which one is killed.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath
from tqdm import tqdm

from rezero_jax.runs.folder import environment
from tests.faults import compare, damage, kill
from tests.faults.judge import Judge
from tests.faults.runs import FAMILIES, Family, Process, Reference
from tests.faults.tables import Run, damage_table, kill_table
from tests.gcs.faults import Faults
from tests.gcs.server import serving

EXAMPLES = """\
examples:
  all of it, about half an hour on two cores:
    python -m tests.faults.campaign --kills=60 --damages=45 --seed=0 --out=runs/faults
  three kills of each family, and no damage, in some minutes:
    python -m tests.faults.campaign --kills=9 --damages=0 --out=runs/faults
  other moments and other bits:
    python -m tests.faults.campaign --seed=1 --out=runs/faults1
  the same in a bucket, and with two processes a run:
    python -m tests.faults.campaign --storage=gs --out=runs/faults_gs
    python -m tests.faults.campaign --processes=2 --kills=9 --damages=0 --out=runs/faults2

exit status: 0 nothing was lost; 1 something was: the table tells, DIR/report.json tells more, and
the folders of the runs concerned are left in DIR.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.campaign",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=60, help="in all, over three families")
    parser.add_argument("--damages", type=int, default=45, help="in all, over three families")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damages")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--storage", choices=("disk", "gs"), default="disk", help="of the folders")
    parser.add_argument("--faults", type=float, default=0.02, help="share of requests, with gs")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; name a new folder")
    logging.getLogger("absl").setLevel(logging.ERROR)

    out = args.out.absolute()
    with storage(args.storage, args.faults, args.seed) as (place, env):
        families = [
            dataclasses.replace(family, storage=place, environment=env).of_processes(args.processes)
            for family in FAMILIES
        ]
        results, failures = run(families, args.kills, args.damages, args.seed, args.jobs, out)
    report = {
        "arguments": vars(args) | {"out": str(out)},
        "environment": environment(),
        "runs": [dataclasses.asdict(result) for result in results],
        "failures": failures,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{kill_table(families, results)}\n\n{damage_table(results)}\n")
    print("\n".join(["FAILED", *failures]) if failures else "nothing was lost")
    print(f"everything: {out / 'report.json'}")
    return 1 if failures else 0


@contextlib.contextmanager
def storage(name: str, rate: float, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """`Family.storage` and `Family.environment`; this process has the storage without faults."""
    if name == "disk":
        yield "", {}
        return
    with serving(["runs"]) as sound, serving(["runs"], Faults(rate, seed)) as faulty:
        faulty.store = sound.store
        os.environ.update(sound.environment)
        yield "gs://runs", faulty.environment
        print(f"\nfaults of the storage: {faulty.faults.count}", file=sys.stderr)


def run(
    families: Sequence[Family], kills: int, damages: int, seed: int, jobs: int, out: Path
) -> tuple[list[Run], list[str]]:
    """The campaign itself: every run, and what went wrong.

    Args:
      families: the runs.
      kills: how many, over all families.
      damages: how many checkpoints to damage, over all families.
      seed: of everything drawn.
      jobs: how many runs go at once.
      out: an empty folder, or none yet.
    """
    out.mkdir(parents=True, exist_ok=True)
    cache, judge = epath.Path(out) / "compiled", Judge()
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=kills + damages, unit="fault", dynamic_ncols=True) as bar,
    ):
        references = list(pool.map(lambda family: unbroken(family, out, cache), families))
        tasks: dict[Future[Any], str] = {}
        for number, reference in enumerate(references):
            name = reference.family.name
            count = len(range(number, kills, len(references)))
            for i, aims in enumerate(kill.plan(random.Random(f"{seed} {name}"), count)):
                home = out / f"kills_{name}_{i}"
                task: Future[Any] = pool.submit(
                    kill.kill_run,
                    reference,
                    aims,
                    home,
                    reference.family.folder(home) / "compiled" if i == 0 else cache,
                    random.Random(f"{seed} {name} {i}"),
                    judge.differences,
                    bar.update,
                )
                tasks[task] = str(home)
        for i in range(damages):
            home = out / f"damage_{i}"
            kind = damage.KINDS[i % len(damage.KINDS)]
            # Each kind meets every family in turn.
            reference = references[(i + i // len(damage.KINDS)) % len(references)]
            draws = random.Random(f"{seed} damage {i}")
            task = pool.submit(
                damage.damage_run,
                reference,
                kind,
                home,
                cache,
                draws,
                judge.differences,
                judge.is_as_saved,
            )
            task.add_done_callback(lambda _: bar.update())
            tasks[task] = f"{home}, {reference.family.name}, {damage.name_of(kind)}"

        results: list[Run] = []
        failures: list[str] = []
        for task, name in tasks.items():
            try:
                runs = task.result()
            except Exception as error:  # Whatever it is, the others go on.
                failures.append(f"{name}: {type(error).__name__}: {error}")
                continue
            results += runs
            failures += [f"{name}: {problem}" for run in runs for problem in run.problems]
    return results, failures


def unbroken(family: Family, out: Path, cache: epath.Path) -> Reference:
    """The run that nothing stops, on the disk.

    It is made again, in the storage, to know what it takes there once all is compiled.

    Raises:
      RuntimeError: it fails, or its bits are others the second time.
    """
    names = [out / f"unbroken_{family.name}_{i}" for i in range(2)]
    folders = [epath.Path(names[0]), family.folder(names[1])]
    for folder, name in zip(folders, names, strict=True):
        process = Process(family, folder, name.with_suffix(".log"), cache)
        if code := process.wait():
            raise RuntimeError(f"an unbroken run ends with status {code}:\n{process.said.text}")
        seconds = process.age
    if found := compare.differences(*folders):
        raise RuntimeError(f"two unbroken runs of {family.name} differ: {found}")
    final = json.loads((folders[1] / "final.json").read_text())
    training = final["seconds"] - final["time/start"] - final["time/compilation"]
    return Reference(family, folders[0], seconds, training)


if __name__ == "__main__":
    sys.exit(main())
