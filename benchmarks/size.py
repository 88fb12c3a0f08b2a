"""The size of the project as a Markdown table: `make size`.

A read path lists the files that a reader opens to follow one update, from the command to the
changed parameter. Lines include blank lines and docstrings, in files that git tracks.
tests/test_structure.py checks the limits.
"""

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

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


def lines_of(path: Path) -> int:
    """The lines of a file; 0 if it is absent."""
    return len(path.read_text().splitlines()) if path.is_file() else 0


def tracked(*folders: str, root: Path = ROOT) -> dict[str, int]:
    """{path: lines} of the tracked Python files below these folders."""
    command = ["git", "-C", str(root), "ls-files", "--", *folders]
    paths = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    lines = {path: lines_of(root / path) for path in paths if path.endswith(".py")}
    return {path: count for path, count in lines.items() if (root / path).is_file()}


def short(files: dict[str, int]) -> list[str]:
    """The paths of files under SHORT lines, except `__init__.py`."""
    return [p for p, lines in files.items() if lines < SHORT and not p.endswith("__init__.py")]


def read_path(family: str, root: Path = ROOT) -> dict[str, int]:
    """{path: lines} of a read path."""
    return {path: lines_of(root / path) for path in READ_PATHS[family]}


def frames(family: str, root: Path = ROOT) -> list[str]:
    """The project's functions on the stack, from the training step to the residual rule."""
    from rezero_jax.config import load_config
    from rezero_jax.training.trainer import Trainer

    package = str(root / "rezero_jax")
    longest: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{package}/residual/"):
            own = [(name, file) for name, file in _stack(frame) if file.startswith(package)]
            starts = [i for i, (name, _) in enumerate(own) if name.endswith("train_step")]
            rules = [
                i for i, (_, file) in enumerate(own) if file.startswith(f"{package}/residual/")
            ]
            if starts and rules[0] - starts[-1] >= len(longest):
                longest[:] = [name for name, _ in own[starts[-1] : rules[0] + 1]]

    trainer = Trainer(load_config(str(root / CONFIGS[family])))
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


def loaded_by(module: str, root: Path = ROOT) -> list[str]:
    """The project's files that an import of the module loads."""
    code = (
        f"import sys, {module}; files = [getattr(m, '__file__', None) for m in "
        f"sys.modules.values()]; print(*[f for f in files if f and f.startswith({str(root)!r})])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    inside = (Path(file).relative_to(root) for file in done.stdout.split())
    return sorted(str(path) for path in inside if not path.parts[0].startswith("."))


def table(root: Path = ROOT) -> Iterator[str]:
    """The lines of the Markdown table, and of the read paths below it."""
    yield "| | files | lines |"
    yield "| --- | --- | --- |"
    for family in READ_PATHS:
        path = read_path(family, root)
        yield f"| read from the command to the updated parameter, {family} | {_sum(path)} |"
    for family in READ_PATHS:
        depth = len(frames(family, root))
        yield f"| own stack frames from step to residual add, {family} | {depth} | |"
    package = tracked("rezero_jax", root=root)
    yield f"| rezero_jax | {_sum(package)} |"
    yield f"| experiments | {_sum(tracked('experiments', root=root))} |"
    yield f"| benchmarks, rehearsal | {_sum(tracked('benchmarks', 'rehearsal', root=root))} |"
    yield f"| tests | {_sum(tracked('tests', root=root))} |"
    few = len(short(package))
    yield f"| rezero_jax, files under {SHORT} lines (without `__init__`) | {few} | |"
    longest = max(package, key=lambda path: package[path])
    yield f"| rezero_jax, longest file: {longest} | | {package[longest]:,} |"
    loaded = loaded_by("rezero_jax.residual", root)
    yield f"| loaded by `import rezero_jax.residual` | {len(loaded)} | |"
    for family in READ_PATHS:
        yield f"\nRead path, {family}:\n"
        yield from (f"- {path}: {lines}" for path, lines in read_path(family, root).items())


def _sum(files: dict[str, int]) -> str:
    """The cells "files | lines"."""
    return f"{len(files)} | {sum(files.values()):,}"


def main() -> None:
    """Prints the table."""
    for line in table():
        print(line)


if __name__ == "__main__":
    main()
