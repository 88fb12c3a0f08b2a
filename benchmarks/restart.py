"""How long a command takes to its first update: at first, again, and when it resumes a run.

    python -m benchmarks.restart

"first" starts with no compiled code on disk, "again" is the same command in another folder, which
finds what the first one compiled, and "resumed" the same command in the first one's folder, which
also reads a checkpoint. Seconds are from the start of the process to the end of its first dispatch,
and in brackets those of this dispatch, which compiles (or reads compiled code) and computes an
update.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = {
    "MLP, 32 x 256": ["configs/mlp.py:depth=32,width=256"],
    "MLP, 10,000 x 150": ["configs/mlp.py:depth=10000,width=150,lr=0.003"],
    "ResNet-20": ["configs/resnet.py:smoke", "model.depth=20"],
    "Transformer, 12 x 128": ["configs/transformer_small.py", "model.depth=12"],
}
FIELDS = [
    "train.epochs=None",
    "train.steps=100000",
    "train.steps_per_dispatch=1",
    "eval.every_epochs=None",
    "eval.every_steps=None",
]


def seconds_to_first_update(run: list[str], workdir: Path, cache: Path) -> tuple[float, float]:
    """Seconds to the end of the first dispatch, and those of the dispatch; then stops the run."""
    spec, *fields = run
    flags = [f"--config.{field}" for field in (*FIELDS, *fields)]
    command = [sys.executable, "train.py", f"--config={spec}", f"--workdir={workdir}", *flags]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(rb"first .* compilation: ([\d.]+) s", line):
                seconds = time.perf_counter() - began
                process.send_signal(signal.SIGTERM)  # which saves
                process.stdout.read()
                process.wait()
                return seconds, float(found[1])
    raise RuntimeError(f"{' '.join(command)} ended before its first update")


def main() -> None:
    """Runs the command line."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("| seconds to the first update | first | again | resumed |")
    print("| --- | --- | --- | --- |")
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            cache, one, other = (Path(folder) / part for part in ("cache", "one", "other"))
            cells = []
            for workdir in (one, other, one):
                seconds, dispatch = seconds_to_first_update(run, workdir, cache)
                cells.append(f"{seconds:.1f} ({dispatch:.1f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
