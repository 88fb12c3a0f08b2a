"""Kills training and damages its checkpoints, many times, and checks that nothing is lost.

(a) kill -9 of `train.py`: a third at random moments from the start of the process to its end, a
third at random moments while it trains, a third while it writes a checkpoint. The same command is
started again, up to five kills in a row before a run may finish. It must go on from the newest
finished checkpoint, and end with the bits of a run that nothing stopped: its state, metrics.jsonl,
TensorBoard's scalars, final.json and the checkpoints it keeps.

(b) Damaged checkpoints. A run must either set the checkpoint aside, with a warning that names it,
and go on from the one before; or the damage is harmless: what is restored is, to the bit, what was
saved. It must end with the same bits too.

The runs are small networks of each family, on one machine's CPU.
"""

import argparse
import dataclasses
import json
import logging
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rezero_jax.config import load_config
from rezero_jax.formatting import markdown_table
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.folder import environment
from rezero_jax.training.trainer import Trainer
from tests.faults import compare, damage, kill
from tests.faults.runs import FAMILIES, ROOT, Family, Process, Reference

EXAMPLES = """\
examples:
  all of it, about half an hour on two cores:
    python -m tests.faults.campaign --kills=60 --damages=45 --seed=0 --out=runs/faults
  three kills of each family, and no damage, in some minutes:
    python -m tests.faults.campaign --kills=9 --damages=0 --out=runs/faults
  other moments and other bits:
    python -m tests.faults.campaign --seed=1 --out=runs/faults1

exit status: 0 nothing was lost; 1 something was: the table tells, DIR/report.json tells more, and
the folders of the runs concerned are left in DIR.
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
    parser.add_argument("--kills", type=int, default=60, help="in all, over three families")
    parser.add_argument("--damages", type=int, default=45, help="in all, over three families")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damages")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; name a new folder")
    logging.getLogger("absl").setLevel(logging.ERROR)

    out = args.out.absolute()
    results, failures = run(args.kills, args.damages, args.seed, args.jobs, out)
    report = {
        "arguments": {"kills": args.kills, "damages": args.damages, "seed": args.seed},
        "environment": environment(),
        "runs": [dataclasses.asdict(result) for result in results],
        "failures": failures,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{kill_table(results)}\n\n{damage_table(results)}\n")
    print("\n".join(["FAILED", *failures]) if failures else "nothing was lost")
    print(f"everything: {out / 'report.json'}")
    return 1 if failures else 0


def run(kills: int, damages: int, seed: int, jobs: int, out: Path) -> tuple[list[Run], list[str]]:
    """The campaign itself: every run, and what went wrong.

    Args:
      kills: how many, over all families.
      damages: how many checkpoints to damage, over all families.
      seed: of everything drawn.
      jobs: how many runs go at once.
      out: an empty folder, or none yet.
    """
    out.mkdir(parents=True, exist_ok=True)
    cache, judge = out / "compiled", Judge()
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=kills + damages, unit="fault", dynamic_ncols=True) as bar,
    ):
        references = list(pool.map(lambda family: unbroken(family, out, cache), FAMILIES))
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
                    home / "compiled" if i == 0 else cache,
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


def unbroken(family: Family, out: Path, cache: Path) -> Reference:
    """The run that nothing stops; it is made twice, to know what it takes once all is compiled.

    Raises:
      RuntimeError: it fails, or its bits are others the second time.
    """
    folders = [out / f"unbroken_{family.name}_{i}" for i in range(2)]
    for folder in folders:
        process = Process(family, folder, folder.with_suffix(".log"), cache)
        if code := process.wait():
            raise RuntimeError(f"an unbroken run ends with status {code}:\n{process.said.text}")
        seconds = process.age
    if found := compare.differences(*folders):
        raise RuntimeError(f"two unbroken runs of {family.name} differ: {found}")
    final = json.loads((folders[1] / "final.json").read_text())
    training = final["seconds"] - final["time/start"] - final["time/compilation"]
    return Reference(family, folders[1], seconds, training)


class Judge:
    """Compares to the bit; for several threads, of which one at a time may use Orbax."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._programs: dict[str, Trainer] = {}

    def differences(self, one: Path, other: Path) -> list[str]:
        """What two finished runs do not share; see `compare.differences`."""
        with self._lock:
            return compare.differences(one, other)

    def is_as_saved(self, reference: Reference, checkpoint: Path) -> bool:
        """Whether a checkpoint is restored to what the reference saved at its step."""
        sound = reference.workdir / "checkpoints" / checkpoint.name
        with self._lock:
            a, b = (self._restored(reference.family, folder) for folder in (checkpoint, sound))
        if a is None or b is None:
            return False
        changed = compare.changed_arrays(compare.by_path(a[0]), compare.by_path(b[0]))
        return not changed and json.dumps(a[1]) == json.dumps(b[1])

    def _restored(self, family: Family, checkpoint: Path) -> tuple[Any, dict[str, Any]] | None:
        """State and progress, as train.py would restore them; of a copy, which it may move."""
        config = load_config(str(ROOT / family.config), [*family.settings, "mesh.data=1"])
        if family.name not in self._programs:
            self._programs[family.name] = Trainer.from_config(config)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "checkpoints"
            shutil.copytree(checkpoint, copy / checkpoint.name)
            checkpoints = Checkpoints(copy, config.checkpoint)
            try:
                return checkpoints.restore(self._programs[family.name].shapes, lambda _: None)
            finally:
                checkpoints.close()


def kill_table(results: Sequence[Run]) -> str:
    """How many kills of each family struck when, and what they cost."""
    columns = [
        "family",
        "runs",
        "kills",
        *kill.PHASES,
        "most steps lost",
        "a save each",
        "same bits",
    ]
    rows = []
    for family in FAMILIES:
        runs = [r for r in results if isinstance(r, kill.KilledRun) and r.family == family.name]
        kills = [k for run in runs for k in run.kills]
        lost = [k.lost for k in kills if k.lost is not None]
        rows.append(
            [
                family.name,
                len(runs),
                len(kills),
                *(sum(k.phase == phase for k in kills) for phase in kill.PHASES),
                max(lost, default=0),
                family.save_every,
                f"{sum(not run.problems for run in runs)}/{len(runs)}",
            ]
        )
    return markdown_table([columns, *rows])


def damage_table(results: Sequence[Run]) -> str:
    """What became of the damaged checkpoints, by kind."""
    damaged = [result for result in results if isinstance(result, damage.DamagedRun)]
    names = map(damage.name_of, damage.KINDS)
    groups = [(name, [d for d in damaged if d.kind == name]) for name in names]
    rows = [
        [
            name,
            len(group),
            *(sum(d.outcome == outcome for d in group) for outcome in damage.OUTCOMES),
            f"{sum(not d.problems for d in group)}/{len(group)}",
        ]
        for name, group in [*groups, ("all", damaged)]
    ]
    return markdown_table([["damage", "checkpoints", *damage.OUTCOMES, "same bits"], *rows])


if __name__ == "__main__":
    sys.exit(main())
