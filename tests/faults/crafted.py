"""Reads crafted exports, run folders, safetensors files and texts, many times.

Each input is a sound one with some changes. Whoever reads it must succeed or raise a UserError: one
sentence without control characters. A traceback of any other error, a reader that hangs, a changed
file outside the input's folder, and memory beyond GROWTH are failures.

    python -m tests.faults.crafted --inputs=2000 --seed=0
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import rezero_jax
from rezero_jax import data, export
from rezero_jax.analysis import plots, table
from rezero_jax.config import base_config
from rezero_jax.errors import UserError
from rezero_jax.models.weights import load_tensors, save_tensors
from rezero_jax.training import load as training_load
from rezero_jax.training import loop

PATIENCE = 20  # seconds after which a reader hangs
GROWTH = 500  # MB by which one input may raise the largest memory of this process
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3.5, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**63, 10**400),
    *("", "x", "8", "(", "(a+", "../x", "/etc/passwd", "os:system", "$\\frac$", "a" * 100_000),
    *("\x1b[31mred", "\r\x9b0m", "| x |", "[a](http://b)", "<img src=x>", "\ud800"),
    *([], [1], [[]], {}, {"a": 1}, {"a.b": 1}, [2**62, 2**62], [-1], [0], 10_000_000),
)
Read = Callable[[Path], Any]


# ---- Changes


def leaves(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a tree of JSON."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from leaves(tree[key])


def change_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON object with one or two other values, fewer or more keys, or broken."""
    tree = json.loads(content)
    for _ in range(rng.randint(1, 2)):
        container, key = rng.choice(list(leaves(tree)) or [({}, "")])
        kind = rng.random()
        if kind < 0.7:
            container[key] = rng.choice(VALUES)
        elif kind < 0.85 and isinstance(container, dict):
            container.pop(key, None)
        elif isinstance(container, dict):
            container[str(rng.choice(VALUES))] = rng.choice(VALUES)
    text = json.dumps(tree, ensure_ascii=False)
    if rng.random() < 0.05:
        text = rng.choice(("[" * 100_000, "[]", "null", "3", '"x"', "", "{}", "\x00", "1" * 10_000))
    return text.encode(errors="surrogatepass")


def change_lines(content: bytes, rng: random.Random) -> bytes:
    """A file of JSON objects, one a line, with another line."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    return b"\n".join([*lines[:at], change_json(lines[at], rng), *lines[at + 1 :]])


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Truncated, longer, or with some other bytes."""
    changed = bytearray(content or b"x")
    kind = rng.random()
    if kind < 0.3:
        return bytes(changed[: rng.randrange(len(changed) + 1)])
    if kind < 0.4:
        return bytes(changed) + rng.randbytes(rng.randint(1, 1000))
    for _ in range(rng.randint(1, 20)):
        changed[rng.randrange(min(len(changed), rng.choice((9, 300, 10**9))))] = rng.randrange(256)
    return bytes(changed)


def change_tensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or another length of the header."""
    size = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.3:
        return change_bytes(content, rng)
    header = change_json(header, rng)
    wrong = (2**63, 2**64 - 1, 100_000_000, 0, len(header) + 1)
    length = rng.choice(wrong) if rng.random() < 0.2 else len(header)
    return length.to_bytes(8, "little") + header + rest


CHANGES = {".json": change_json, ".jsonl": change_lines, ".safetensors": change_tensors}


def change_kind(path: Path, outside: Path, rng: random.Random) -> None:
    """Another kind of file under the same name: none, a folder, a pipe, a link, a sparse file."""
    path.unlink()
    kind = rng.randrange(6)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(rng.choice((outside / "file", outside, Path("/dev/zero"), path)))
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(2**36)


def change(folder: Path, outside: Path, rng: random.Random) -> None:
    """Changes one or two files of a folder."""
    for _ in range(rng.randint(1, 2)):
        regular = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        found = sorted(path for path in regular if path.stat().st_size < 2**20)
        # The few files with names that readers know, more often than those of checkpoints.
        known = [path for path in found if "checkpoints" not in path.parts]
        if not found:
            return
        path = rng.choice(known if known and rng.random() < 0.9 else found)
        if rng.random() < 0.15:
            change_kind(path, outside, rng)
            continue
        content = path.read_bytes()
        try:
            path.write_bytes(CHANGES.get(path.suffix, change_bytes)(content, rng))
        except (ValueError, RecursionError):  # The first change left no JSON.
            path.write_bytes(change_bytes(content, rng))


# ---- Readers


def by_command(main: Callable[[Sequence[str]], int], *words: str) -> Read:
    """A command on a folder; a status other than 0 is a UserError with what was printed."""

    def read(folder: Path) -> None:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = main([str(folder), *(word.format(folder=folder) for word in words)])
        if status:
            raise UserError(errors.getvalue().rstrip("\n").splitlines()[-1])

    return read


def read_text(folder: Path) -> None:
    config = base_config().data
    config.name, config.path, config.length = "text", str(folder), 8
    data.load(config, download=False)


READERS: dict[str, tuple[tuple[str, Read], ...]] = {
    "export": (("load", rezero_jax.load),),
    "tensors": (("load_tensors", lambda folder: load_tensors(folder / "a.safetensors")),),
    "run": (
        ("export", by_command(export.main, "--out={folder}.exported")),
        ("table", by_command(table.main)),
        ("plots", by_command(plots.main, "--out={folder}.png")),
        ("model", training_load.load_model),
    ),
    "text": (("text", read_text),),
}


def sound_inputs(run: Path, home: Path) -> dict[str, Path]:
    """A sound folder for each kind of input."""
    folders = {kind: home / f"sound_{kind}" for kind in READERS}
    model = rezero_jax.MLP(4, 8, 2, 3, rngs=nnx.Rngs(0))
    rezero_jax.save(model, folders["export"])
    for kind in ("tensors", "text"):
        folders[kind].mkdir()
    arrays = {"a": jax.numpy.ones((3, 4)), "b": jax.numpy.zeros((), int)}
    save_tensors(folders["tensors"] / "a.safetensors", arrays)
    for i in range(3):
        (folders["text"] / f"{i}.txt").write_text("some text\n" * 100)
    shutil.copytree(run, folders["run"])
    return folders


def largest_memory() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Hangs(BaseException):
    """A reader has not answered; readers that catch exceptions do not catch this one."""


def outcome(read: Read, folder: Path) -> str:
    """What became of one input: "read", "refused", or the failure in words."""
    before = largest_memory()

    def hangs(*_: object) -> None:
        raise Hangs(f"no answer in {PATIENCE} s")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    try:
        read(folder)
        result = "read"
    except UserError as error:
        text = str(error)
        result = "refused" if text.isprintable() and text else f"NOT A SENTENCE {text!r}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        result = f"{type(error).__name__}: {str(error)[:200]!r} at {frames[-1]}"
    finally:
        signal.alarm(0)
    if (grown := largest_memory() - before) > GROWTH:
        result = f"MEMORY grew by {grown:.0f} MB; {result}"
    return result


def campaign(run: Path, home: Path, inputs: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Reads crafted inputs in turn by every reader; returns counts of outcomes, and failures."""
    outside = home / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    counts, failures, sound = Counter[str](), [], sound_inputs(run, home)
    pairs = [(kind, *reader) for kind, readers in READERS.items() for reader in readers]
    for kind, name, read in pairs:  # also imports and compiles, which takes memory
        assert outcome(read, sound[kind]) == "read", (name, outcome(read, sound[kind]))
    for number in range(inputs):
        kind, name, read = pairs[number % len(pairs)]
        rng = random.Random(f"{seed} {number}")
        folder = home / f"input{number}"
        shutil.copytree(sound[kind], folder)
        change(folder, outside, rng)
        result = outcome(read, folder)
        if sorted(os.listdir(outside)) != ["file"] or (outside / "file").read_text() != "mine":
            result = "WROTE OUTSIDE"
        counts[f"{name}: {result if result in ('read', 'refused') else 'FAILED'}"] += 1
        if result not in ("read", "refused"):
            failures.append(f"input {number}, {name}: {result}")
            continue
        for left in (folder, *home.glob(f"{folder.name}.*")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return counts, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.crafted", description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000, help="number (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes (default: 0)")
    args = parser.parse_args(argv)
    from tests.families import FAMILIES

    home = Path(tempfile.mkdtemp(prefix="rezero_jax-crafted-"))
    loop.train(FAMILIES["mlp"].load_config(), home / "run")
    counts, failures = campaign(home / "run", home, args.inputs, args.seed)
    print("\n".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    print(
        "\n".join(
            ["FAILED", *failures, f"inputs are left in {home}"] if failures else ["none failed"]
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
