"""The user's own images: PNG and JPEG files in a folder per class, or an .npz file of arrays."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rezero_jax.data.pixels import Decode
from rezero_jax.data.text_files import files_below
from rezero_jax.data.tfds.source import read_npz
from rezero_jax.errors import UserError, closest_beside, first_line, printable

ENDINGS = (".png", ".jpg", ".jpeg")
# The usual names of splits and arrays, such as the folder "val" and the array "x_train".
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
KINDS = {
    **dict.fromkeys(("image", "images", "x"), "image"),
    **dict.fromkeys(("label", "labels", "y"), "label"),
}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror or first_line(error)}); "
            "make it readable or remove it"
        ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files below a folder as a stream.DataSource.

    Attributes:
      root: the folder.
      examples: for each file, its path below `root`, with /, and the index of its class.
    """

    root: Path
    examples: Sequence[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, keys: Sequence[int]) -> list[Mapping[str, Any]]:
        chosen = [self.examples[key] for key in keys]
        paths = [os.path.join(self.root, name) for name, _ in chosen]
        return [
            {"image": path, "label": label, "file_name": name}
            for path, (name, label) in zip(paths, chosen, strict=True)
        ]

    def files(self) -> str:
        """A hash of the names, classes and sizes of the files, which are not read."""
        with _readable(self.root):
            sizes = [os.stat(self.root / name).st_size for name, _ in self.examples]
        return hashlib.sha256(repr((self.examples, sizes)).encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """A hash of the contents and classes of the files."""
        digests = []
        for name, label in self.examples:
            with _readable(self.root / name), open(self.root / name, "rb") as file:
                digests.append((hashlib.file_digest(file, "sha256").hexdigest(), label))
        return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Images in memory as a stream.DataSource."""

    image: np.ndarray  # uint8 (N, H, W, C)
    label: np.ndarray  # int32 (N,)

    def __len__(self) -> int:
        return len(self.label)

    def __getitems__(self, keys: Sequence[int]) -> list[Mapping[str, Any]]:
        return [{"image": self.image[key], "label": self.label[key]} for key in keys]


# The training split and then the evaluation split, by name; the classes; how images are decoded.
Own = tuple[
    Mapping[str, Arrays | ImageFiles], tuple[str, ...], Callable[[Any, int, int], np.ndarray]
]


def own_images(config: ConfigDict) -> Own:
    """The two splits and the classes of the images at config.path, and how images are decoded.

    In a folder, train/ and validation/ or test/ (or other usual names) are the splits, and the
    folders in each are the classes. Without a folder for evaluation, a hash of its path decides
    whether a file is in the fraction `config.eval_fraction` for evaluation, so that adding files
    moves no other file. The examples are in the order of these hashes.

    An .npz file has the arrays `image`, uint8 (N, H, W) or (N, H, W, C), and `label`, int (N,), or
    both per split, such as x_train and y_train. Without a split for evaluation, a hash of each
    image decides. The array `classes` may name the classes.

    Raises:
      UserError: the path is no such folder or file, or cannot be read.
    """
    if not config.path:
        raise UserError("data.name=images needs a folder or .npz file; set --config.data.path=...")
    path = Path(config.path).expanduser()
    with _readable(path):
        if path.is_dir():
            return _of_folder(path, config)
        if path.is_file() and path.suffix.lower() == ".npz":
            return _of_arrays(path, config)
    close = closest_beside(path)
    hint = f"did you mean {close}?" if close else "give another path"
    raise UserError(f"data.path={config.path} is not a folder or .npz file; {hint}")


def evaluation_part(config: ConfigDict, parts: Iterable[str]) -> str | None:
    """The split for evaluation: config.eval_split, or else the other one; None without either."""
    wanted = (config.eval_split, "validation", "test")
    return next((part for part in wanted if part in parts), None)


def _of_folder(root: Path, config: ConfigDict) -> Own:
    parts: dict[str, Path] = {}
    for folder in _folders(root):
        part = PARTS.get(folder.name.lower())
        if part and _folders(folder):  # a class called "train" has no folders
            if part in parts:
                raise UserError(f"{root} has both {parts[part].name} and {folder.name}; keep one")
            parts[part] = folder
    if "train" not in parts:
        parts = {"train": root}
    classes = tuple(folder.name for folder in _folders(parts["train"]))
    if len(classes) < 2:
        raise UserError(
            f"{parts['train']} has {len(classes)} folders of classes; put the images of each class "
            "into a folder of its own, or name the folder that has these folders"
        )
    train, part = _examples(parts["train"], classes), evaluation_part(config, parts)
    if part:
        held = _examples(parts[part], classes)
    else:
        part, parts["eval"] = "eval", parts["train"]
        count = sum(share < config.eval_fraction for share, _, _ in train)
        held, train = train[:count], train[count:]
    listed = {"train": train, part: held}
    sources = {
        name: ImageFiles(parts[name], [example[1:] for example in examples])
        for name, examples in listed.items()
    }
    return sources, classes, Decode(config.image_size, upright=True)


def _folders(root: Path) -> list[Path]:
    """The folders in a folder, also linked ones, without hidden ones and those of archivers."""
    found = (path for path in root.iterdir() if path.is_dir())
    return sorted(path for path in found if not path.name.startswith((".", "__MACOSX")))


def _examples(root: Path, classes: tuple[str, ...]) -> list[tuple[float, str, int]]:
    """Hash, path below `root` and class of the images in its class folders, sorted by the hash."""
    found: list[tuple[float, str, int]] = []
    others = [path for path in root.iterdir() if path.is_file()]
    for folder in _folders(root):
        if folder.name not in classes:
            raise UserError(
                f"{folder} is not a class of the training images, which are "
                f"{', '.join(classes)[:200]}; rename or remove it"
            )
        before = len(found)
        for path in files_below(folder):
            name = path.relative_to(root).as_posix()
            if path.suffix.lower() in ENDINGS:
                # Systems write the same name in different forms of Unicode, or not in Unicode.
                same = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
                found.append((_share(same), name, classes.index(folder.name)))
            else:
                others.append(path)
        if len(found) == before:
            raise UserError(f"{folder} has no PNG or JPEG images; add images or remove the folder")
    if shown := [path for path in others if not path.name.startswith(".")]:
        warn = logging.getLogger(__name__).warning
        text = "left out, as they are no PNG or JPEG images of a class: %d, such as %s"
        warn(text, len(shown), printable(shown[0]))
    return sorted(found)


def _as_it_is(image: np.ndarray, step: int, position: int) -> np.ndarray:
    return image


def _share(content: bytes) -> float:
    """A hash in 0 .. 1, uniform over contents."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def _of_arrays(path: Path, config: ConfigDict) -> Own:
    try:
        arrays = read_npz(path)
    except UserError:
        raise
    except Exception as error:  # a damaged zip file raises many kinds of errors
        raise UserError(
            f"{path} cannot be read as an .npz file of arrays ({first_line(error)}); write the "
            "arrays again by np.savez"
        ) from error
    if config.image_size is not None:
        raise UserError(f"data.image_size resizes image files, not the arrays in {path}; unset it")
    classes = tuple(map(str, arrays.pop("classes", ())))
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        words = name.lower().split("_")
        kinds = [KINDS[word] for word in words if word in KINDS]
        names = [PARTS[word] for word in words if word in PARTS]
        if len(kinds) != 1 or len(kinds) + len(names) != len(words):
            raise UserError(
                f"{path} has the array {name}, which is none of image, label and classes; name the "
                "arrays of a split like x_train and y_train"
            )
        parts.setdefault((names or ["train"])[0], {})[kinds[0]] = array
    part = evaluation_part(config, parts)
    train = _labelled(path, "train", parts.get("train", {}))
    count = int(train.label.max()) + 1
    if part:
        sources = {"train": train, part: _labelled(path, part, parts[part])}
    else:
        shares = np.array([_share(image.tobytes()) for image in train.image])
        held = shares < config.eval_fraction
        sources = {
            name: Arrays(train.image[chosen], train.label[chosen])
            for name, chosen in (("train", ~held), ("eval", held))
        }
    return sources, classes or tuple(map(str, range(count))), _as_it_is


def _labelled(path: Path, part: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The images and labels of one split of an .npz file; raises a UserError for other arrays."""
    if missing := {"image", "label"} - arrays.keys():
        raise UserError(f"{path} has no array {min(missing)} of the {part} split; add it")
    image, label = arrays["image"], arrays["label"]
    sides = image.ndim in (3, 4) and image.shape[3:] <= (4,) and image.size
    if image.dtype != np.uint8 or not sides:
        raise UserError(
            f"the {part} images in {path} are {image.dtype} {image.shape}; give uint8, 0 .. 255, "
            "of (N, H, W) or (N, H, W, C) with at most 4 channels"
        )
    whole = label.dtype.kind in "iu" and label.size == len(image) > 0
    if not whole or not 0 <= label.min() <= label.max() < 100_000:
        raise UserError(
            f"the {part} labels in {path} are {label.dtype} {label.shape}; give a whole number, "
            f"0 .. 99999, for each of the {len(image)} images"
        )
    return Arrays(image.reshape(*image.shape[:3], -1), label.reshape(-1).astype(np.int32))
