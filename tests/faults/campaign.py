"""Kills training and damages its checkpoints, many times, and checks that nothing is lost.

(a) kill -9 of `train.py`: a third of the kills strike at random moments from the start of the
process to its end, a third at random moments while it trains, a third while it writes a checkpoint.
The same command is started again, up to five kills in a row before a run may finish. The run must
resume from the newest finished checkpoint and end with the bits of a run that nothing stopped: its
state, metrics.jsonl, TensorBoard's scalars, final.json and the checkpoints it keeps.

(b) Damaged checkpoints. A run must set the checkpoint aside, with a warning that names it, and
resume from the previous one, unless the damage is harmless. It must end with the same bits.

The runs are small networks of each family, on one machine's CPU. With --storage=gs their workdirs
are in a bucket of a server on this machine, and one request in 50 fails: a process that ends with
status 4 is started again.

    python -m tests.faults.campaign --kills=60 --damages=45 --seed=0 --out=runs/faults

Exit status: 0 nothing was lost; 1 something was: DIR/report.json states what, and the folders of
these runs are left in DIR.
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
from tests.faults.runs import FAMILIES, UNAVAILABLE, Family, Process, Reference, Task
from tests.gcs.faults import Faults
from tests.gcs.server import serving


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=60, help="over all families (default: 60)")
    parser.add_argument("--damages", type=int, default=45, help="over all families (default: 45)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and damages")
    parser.add_argument("--jobs", type=int, default=2, help="simultaneous runs (default: 2)")
    parser.add_argument("--storage", choices=("disk", "gs"), default="disk", help="of workdirs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; name a new folder")
    logging.getLogger("absl").setLevel(logging.ERROR)

    out = args.out.absolute()
    with storage(args.storage, args.seed) as (place, env):
        families = [
            dataclasses.replace(family, storage=place, environment=env) for family in FAMILIES
        ]
        results, failures = run(families, args.kills, args.damages, args.seed, args.jobs, out)
    report = {"arguments": vars(args) | {"out": str(out)}, "environment": environment()}
    report |= {"runs": results, "failures": failures}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for family in families:
        runs = [result for result in results if result["family"] == family.name]
        kills = Counter(phase for run in runs for phase in run.get("kills", ()))
        damages = Counter(run["outcome"] for run in runs if "outcome" in run)
        same = sum(not run["problems"] for run in runs)
        print(f"{family.name}: kills {dict(kills)}, damages {dict(damages)}")
        print(f"{family.name}: the same bits {same}/{len(runs)}")
    print(f"starts again after an outage: {sum(result['outages'] for result in results)}")
    print("\n".join(["FAILED", *failures]) if failures else "nothing was lost")
    print(f"everything: {out / 'report.json'}")
    return 1 if failures else 0


@contextlib.contextmanager
def storage(name: str, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """`Family.storage` and `Family.environment`; requests of this process do not fail."""
    if name == "disk":
        yield "", {}
        return
    with serving(["runs"]) as sound, serving(["runs"], Faults(0.02, seed)) as faulty:
        faulty.store = sound.store
        os.environ.update(sound.environment)
        folder_of("gs://runs")  # ends the caching of listings
        yield "gs://runs", faulty.environment
        print(f"\nfaults of the storage: {faulty.faults.count}", file=sys.stderr)


def run(
    families: Sequence[Family], kills: int, damages: int, seed: int, jobs: int, out: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Makes all runs; returns them, and one text for each problem."""
    out.mkdir(parents=True, exist_ok=True)
    cache = epath.Path(out) / "compiled"
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
                task = Task(reference, home, own, random.Random(f"{seed} {name} {i}"))
                tasks[pool.submit(kill.kill_run, task, aims, bar.update)] = str(home)
        for i in range(damages):
            home = out / f"damage_{i}"
            kind = damage.KINDS[i % len(damage.KINDS)]
            # Each kind meets every family in turn.
            reference = references[(i + i // len(damage.KINDS)) % len(references)]
            task = Task(reference, home, cache, random.Random(f"{seed} damage {i}"))
            future = pool.submit(damage.damage_run, task, kind)
            future.add_done_callback(lambda _: bar.update())
            tasks[future] = f"{home}, {reference.family.name}, {damage.name_of(kind)}"

        results, failures = list[dict[str, Any]](), list[str]()
        for future, name in tasks.items():
            try:
                runs = future.result()
            except Exception as error:  # Whatever it is, the other runs go on.
                failures.append(f"{name}: {type(error).__name__}: {error}")
                continue
            results += runs
            failures += [f"{name}: {problem}" for run in runs for problem in run["problems"]]
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
        while (code := process.wait()) == UNAVAILABLE:
            process = Process(family, folder, name.with_suffix(".log"), cache)
        if code:
            raise RuntimeError(f"an unbroken run ends with status {code}:\n{process.said.text}")
        seconds = process.age
    if found := compare.differences(*folders):
        raise RuntimeError(f"two unbroken runs of {family.name} differ: {found}")
    final = json.loads((folders[1] / "final.json").read_text())
    training = final["seconds"] - final["time/start"] - final["time/compilation"]
    return Reference(family, folders[0], seconds, training)


if __name__ == "__main__":
    sys.exit(main())
