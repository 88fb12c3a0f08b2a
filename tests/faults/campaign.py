"""Kills training and damages its checkpoints, many times, and checks that nothing is lost.

(a) kill -9 of `train.py`: a third of the kills strike at random moments from the start of the
process to its end, a third at random moments while it trains, a third while it writes a checkpoint.
The same command is started again, up to five kills in a row before a run may finish. The run must
resume from the newest finished checkpoint and end with the bits of a run that nothing stopped: its
state, metrics.jsonl, TensorBoard's scalars, final.json and the checkpoints it keeps.

(b) Damaged checkpoints. A run must either set the checkpoint aside, with a warning that names it,
and resume from the previous one; or the damage must be harmless: what is restored is, to the bit,
what was saved. The run must end with the same bits.

The runs are small networks of each family, on one machine's CPU. With --storage=gs their workdirs
are in a bucket of a server on this machine, and requests to it fail at random: a process that ends
with status 4 is started again. With --processes=N each run has N processes, one of which is killed.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath
from tqdm import tqdm

from rezero_jax.runs.files import folder_of
from rezero_jax.runs.folder import environment
from tests.faults import compare, damage, kill
from tests.faults.compare import Judge
from tests.faults.runs import FAMILIES, UNAVAILABLE, Family, Process, Reference, Task
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

exit status: 0 nothing was lost; 1 something was: DIR/report.json states what, and the folders of
these runs are left in DIR.
"""

Run = kill.KilledRun | damage.DamagedRun


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.campaign",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=60, help="over all families (default: 60)")
    parser.add_argument("--damages", type=int, default=45, help="over all families (default: 45)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and damages")
    parser.add_argument("--jobs", type=int, default=2, help="simultaneous runs (default: 2)")
    parser.add_argument("--storage", choices=("disk", "gs"), default="disk", help="of workdirs")
    parser.add_argument(
        "--faults", type=float, default=0.02, help="share of failing requests, with gs"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes of each run"
    )
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
    print(f"\n{summary(results)}")
    print("\n".join(["FAILED", *failures]) if failures else "nothing was lost")
    print(f"everything: {out / 'report.json'}")
    return 1 if failures else 0


@contextlib.contextmanager
def storage(name: str, rate: float, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """`Family.storage` and `Family.environment`; requests of this process do not fail."""
    if name == "disk":
        yield "", {}
        return
    with serving(["runs"]) as sound, serving(["runs"], Faults(rate, seed)) as faulty:
        faulty.store = sound.store
        os.environ.update(sound.environment)
        folder_of("gs://runs")  # ends the caching of listings
        yield "gs://runs", faulty.environment
        print(f"\nfaults of the storage: {faulty.faults.count}", file=sys.stderr)


def run(
    families: Sequence[Family], kills: int, damages: int, seed: int, jobs: int, out: Path
) -> tuple[list[Run], list[str]]:
    """Makes all runs; returns them, and one text for each problem."""
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
                # One run compiles anew, so that kills can strike while JAX writes its cache.
                own = cache if i else epath.Path(out) / f"compiled_{name}"
                rng = random.Random(f"{seed} {name} {i}")
                task = Task(reference, home, own, rng, judge)
                tasks[pool.submit(kill.kill_run, task, aims, bar.update)] = str(home)
        for i in range(damages):
            home = out / f"damage_{i}"
            kind = damage.KINDS[i % len(damage.KINDS)]
            # Each kind meets every family in turn.
            reference = references[(i + i // len(damage.KINDS)) % len(references)]
            task = Task(reference, home, cache, random.Random(f"{seed} damage {i}"), judge)
            future = pool.submit(damage.damage_run, task, kind)
            future.add_done_callback(lambda _: bar.update())
            tasks[future] = f"{home}, {reference.family.name}, {damage.name_of(kind)}"

        results: list[Run] = []
        failures: list[str] = []
        for future, name in tasks.items():
            try:
                runs = future.result()
            except Exception as error:  # Whatever it is, the other runs go on.
                failures.append(f"{name}: {type(error).__name__}: {error}")
                continue
            results += runs
            failures += [f"{name}: {problem}" for run in runs for problem in run.problems]
    return results, failures


def unbroken(family: Family, out: Path, cache: epath.Path) -> Reference:
    """The run that nothing stops, on the disk.

    A second run, in the storage, shows how long it takes there once everything is compiled.

    Raises:
      RuntimeError: a run fails, or the two runs differ in a bit.
    """
    names = [out / f"unbroken_{family.name}_{i}" for i in range(2)]
    folders = [epath.Path(names[0]), family.folder(names[1])]
    for folder, name in zip(folders, names, strict=True):
        process = Process(family, folder, name.with_suffix(".log"), cache)
        while (code := process.wait()) in UNAVAILABLE:
            process = Process(family, folder, name.with_suffix(".log"), cache)
        if code:
            raise RuntimeError(f"an unbroken run ends with status {code}:\n{process.said.text}")
        seconds = process.age
    if found := compare.differences(*folders):
        raise RuntimeError(f"two unbroken runs of {family.name} differ: {found}")
    final = json.loads((folders[1] / "final.json").read_text())
    training = final["seconds"] - final["time/start"] - final["time/compilation"]
    return Reference(family, folders[0], seconds, training)


def summary(results: Sequence[Run]) -> str:
    """What the kills struck and what became of the damaged checkpoints, one line a family."""
    lines = []
    for family in dict.fromkeys(result.family for result in results):
        runs = [result for result in results if result.family == family]
        phases = Counter(
            k.phase for run in runs if isinstance(run, kill.KilledRun) for k in run.kills
        )
        outcomes = Counter(run.outcome for run in runs if isinstance(run, damage.DamagedRun))
        same = sum(not run.problems for run in runs)
        lines.append(f"{family}: kills {dict(phases)}, damages {dict(outcomes)}")
        lines.append(f"{family}: the same bits {same}/{len(runs)}")
    lines.append(f"starts again after an outage: {sum(result.outages for result in results)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
