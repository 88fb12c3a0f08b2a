"""Time to the first update of a run, by the state of its caches.

    python -m benchmarks.restart

"first" starts with an empty compilation cache. "again" is the same command in another folder, with
a warm cache. "resumed" is the same command in the first folder, and also reads a checkpoint.

The seconds count from the start of the process to the end of its first dispatch; in
brackets is this dispatch alone, which compiles or reads compiled code and computes an update.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.worker import print_head, print_row
from rezero_jax.command import parser, run

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
    """Seconds from the start of a run to the end of its first dispatch, and of this dispatch."""
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
                process.send_signal(signal.SIGTERM)  # saves a checkpoint for "resumed"
                process.stdout.read()
                process.wait()
                return seconds, float(found[1])
    raise RuntimeError(f"{' '.join(command)} ended before its first update")


def main() -> None:
    """Runs the command line."""
    parser("benchmarks.restart", __doc__).parse_args()
    print_head("seconds to the first update", "first", "again", "resumed")
    for name, words in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            cache, one, other = (Path(folder) / part for part in ("cache", "one", "other"))
            cells = []
            for workdir in (one, other, one):
                seconds, dispatch = seconds_to_first_update(words, workdir, cache)
                cells.append(f"{seconds:.1f} ({dispatch:.1f})")
        print_row(name, *cells)


if __name__ == "__main__":
    run(main)
