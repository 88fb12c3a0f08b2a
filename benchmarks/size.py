"""The size of the project as a Markdown table: `make size`.

A read path lists the files that a reader opens to follow one update, from the command to the
changed parameter. Lines include blank lines and docstrings, in files that git tracks.
tests/test_structure.py checks the limits.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from rezero_jax.command import run
from rezero_jax.formatting import markdown_table

ROOT = Path(__file__).parents[1]
SHORT = 60  # lines; a shorter file could be part of another one

READ_BY_ALL = (
    "train.py",
    "launch/flags.py",
    "rezero_jax/config.py",
    "rezero_jax/training/loop.py",
    "rezero_jax/training/intervals.py",
    "rezero_jax/training/trainer.py",
    "rezero_jax/training/step.py",
    "rezero_jax/training/state.py",
    "rezero_jax/training/optim.py",
    "rezero_jax/training/sharding.py",
    "rezero_jax/data/order.py",
    "rezero_jax/data/split.py",
    "rezero_jax/models/build.py",
    "rezero_jax/stack.py",
    "rezero_jax/models/options.py",
    "rezero_jax/residual/rule.py",
    "rezero_jax/residual/rules.py",
)
READ_PATHS = {
    "MLP": (
        *READ_BY_ALL,
        "configs/mlp.py",
        "rezero_jax/data/datasets.py",
        "rezero_jax/models/mlp.py",
    ),
    "Transformer": (
        *READ_BY_ALL,
        "configs/transformer_small.py",
        "rezero_jax/data/text.py",
        "rezero_jax/data/text_files.py",
        "rezero_jax/models/dropout.py",
        "rezero_jax/models/transformer/attention.py",
        "rezero_jax/models/transformer/config.py",
        "rezero_jax/models/transformer/layer.py",
        "rezero_jax/models/transformer/model.py",
    ),
}
CONFIGS = {"MLP": "configs/mlp.py:smoke", "Transformer": "configs/transformer_small.py:smoke"}


def lines_of(path: str | Path) -> int:
    """The lines of a file, given relative to the repository."""
    return len((ROOT / path).read_text().splitlines())


def tracked(*folders: str) -> dict[str, int]:
    """{path: lines} of the tracked Python files below these folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "--", *folders]
    paths = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {p: lines_of(p) for p in paths if p.endswith(".py") and (ROOT / p).is_file()}


def short(files: dict[str, int]) -> list[str]:
    """The paths of files under SHORT lines, except `__init__.py`."""
    return [p for p, lines in files.items() if lines < SHORT and not p.endswith("__init__.py")]


def frames(family: str) -> list[str]:
    """The project's functions on the stack, from the training step to the residual rule."""
    from rezero_jax.config import load_config
    from rezero_jax.training.trainer import Trainer

    package = str(ROOT / "rezero_jax")
    rules = f"{package}/residual/"
    longest: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(rules):
            own = [(name, file) for name, file in _stack(frame) if file.startswith(package)]
            starts = [i for i, (name, _) in enumerate(own) if name.endswith("train_step")]
            end = next(i for i, (_, file) in enumerate(own) if file.startswith(rules))
            if starts and end - starts[-1] >= len(longest):
                longest[:] = [name for name, _ in own[starts[-1] : end + 1]]

    trainer = Trainer(load_config(str(ROOT / CONFIGS[family])))
    state, batches = trainer.init(), list(islice(trainer.batches(0), 1))
    sys.setprofile(profile)
    try:
        trainer.dispatch(state, batches)
    finally:
        sys.setprofile(None)
    return longest


def _stack(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    if frame is not None:
        yield from _stack(frame.f_back)
        yield frame.f_code.co_qualname, frame.f_code.co_filename


def loaded_by(module: str) -> list[str]:
    """The project's files that an import of the module loads."""
    code = (
        f"import sys, {module}; files = [getattr(m, '__file__', None) for m in "
        f"sys.modules.values()]; print(*[f for f in files if f and f.startswith({str(ROOT)!r})])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    inside = (Path(file).relative_to(ROOT) for file in done.stdout.split())
    return sorted(str(path) for path in inside if not path.parts[0].startswith("."))


def table() -> Iterator[Sequence[object]]:
    """The rows of the table."""
    yield "", "files", "lines"
    for family, paths in READ_PATHS.items():
        lines = map(lines_of, paths)
        yield f"read from the command to the updated parameter, {family}", *_sum(lines)
    for family in READ_PATHS:
        yield f"own stack frames from step to residual add, {family}", len(frames(family)), ""
    for folders in (("rezero_jax",), ("experiments",), ("benchmarks", "rehearsal"), ("tests",)):
        yield ", ".join(folders), *_sum(tracked(*folders).values())
    package = tracked("rezero_jax")
    yield f"rezero_jax, files under {SHORT} lines (without `__init__`)", len(short(package)), ""
    longest = max(package, key=lambda path: package[path])
    yield f"rezero_jax, longest file: {longest}", "", f"{package[longest]:,}"
    yield "loaded by `import rezero_jax.residual`", len(loaded_by("rezero_jax.residual")), ""


def _sum(lines: Iterable[int]) -> tuple[int, str]:
    """The cells "files" and "lines"."""
    counts = list(lines)
    return len(counts), f"{sum(counts):,}"


def main() -> None:
    """Prints the table, and the read paths below it."""
    print(markdown_table(table()))
    for family, paths in READ_PATHS.items():
        print(f"\nRead path, {family}:\n")
        print("\n".join(f"- {path}: {lines_of(path)}" for path in paths))


if __name__ == "__main__":
    run(main)
