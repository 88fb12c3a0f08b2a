"""Text from files: the user's own, and the sources of Python's standard library."""

import os
import sysconfig
from collections.abc import Collection
from pathlib import Path

import numpy as np

from rezero_jax.errors import UserError, closest_beside

# Folders of the standard library that are not read.
_FOREIGN_OR_TESTS = {"__pycache__", "dist-packages", "site-packages", "test", "tests"}
_NOT_EVERYWHERE = {"ensurepip", "idlelib", "lib2to3", "turtledemo"}  # some installations lack them
LEFT_OUT = _FOREIGN_OR_TESTS | _NOT_EVERYWHERE


def user_text(path: str | None) -> np.ndarray:
    """The bytes of a file, or of the files below a folder with a newline between two, uint8 (N,).

    Files come in the order of their paths; hidden ones are skipped.

    Raises:
      UserError: there is no path; it leads to no regular file or folder, or to no text; or a file
          cannot be read.
    """
    if not path:
        raise UserError("data.name=text needs a file or folder; set --config.data.path=...")
    root = Path(path).expanduser()
    try:
        if not root.exists():
            close = closest_beside(root)
            hint = f"did you mean {close}?" if close else "give a file or folder"
            raise UserError(f"data.path={path} does not exist; {hint}")
        if not (root.is_file() or root.is_dir()):  # to read a pipe could wait for ever
            raise UserError(f"data.path={path} is a pipe or device; give a regular file or folder")
        files = files_below(root) if root.is_dir() else [root]
        text = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); make it readable or leave it out"
        ) from error
    if not text:
        raise UserError(f"data.path={path} holds no text; give a file or folder that does")
    return np.frombuffer(text, np.uint8)


def stdlib_text(part: str) -> np.ndarray:
    """The files of one part of `stdlib_files`, each followed by a newline, uint8 (N,)."""
    text = b"".join(path.read_bytes() + b"\n" for path in stdlib_files()[part])
    return np.frombuffer(text, np.uint8)


def stdlib_files() -> dict[str, list[Path]]:
    """The .py files of Python's standard library outside LEFT_OUT, about 580 of 11 MB in all.

    They differ between versions and installations of Python. In the order of their paths, number
    10 of each 20 (counting from 0) is in "validation", number 11 in "test" and the others in
    "train", so that all three are text of one kind.
    """
    parts: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    paths = files_below(Path(sysconfig.get_paths()["stdlib"]), LEFT_OUT)
    for number, path in enumerate(path for path in paths if path.suffix == ".py"):
        parts[{10: "validation", 11: "test"}.get(number % 20, "train")].append(path)
    return parts


def files_below(root: Path, left_out: Collection[str] = ()) -> list[Path]:
    """The regular files below `root`, sorted by relative path with / between its parts.

    Hidden files and folders and folders named in `left_out` are skipped. Raises OSError where a
    folder cannot be read.
    """
    paths = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, paths), key=lambda path: path.relative_to(root).as_posix())


def _raise(error: OSError) -> None:
    raise error  # by default os.walk skips what it cannot read
