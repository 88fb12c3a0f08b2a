"""The user's own images: PNG and JPEG files in a folder per class, or an .npz file of arrays."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rezero_jax.data.split import ResidentSplit
from rezero_jax.data.text_files import files_below
from rezero_jax.data.tfds.source import read_npz
from rezero_jax.errors import UserError, first_line, printable

warn = logging.getLogger(__name__).warning

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


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files below the folder `root` as a stream.DataSource.

    `examples` has the path of each file below `root`, with /, and the index of its class.
    """

    root: Path
    examples: Sequence[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, keys: Sequence[int]) -> list[Mapping[str, Any]]:
        chosen = [self.examples[key] for key in keys]
        return [{"image": str(self.root / n), "label": y, "file_name": n} for n, y in chosen]

    def files(self) -> str:
        """A hash of the names, classes and sizes of the files, which are not read."""
        sizes = [os.stat(self.root / name).st_size for name, _ in self.examples]
        return hashlib.sha256(repr((self.examples, sizes)).encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """A hash of the contents and classes of the files."""
        digests = []
        for name, label in self.examples:
            with open(self.root / name, "rb") as file:
                digests.append((hashlib.file_digest(file, "sha256").hexdigest(), label))
        return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]


def evaluation_part(config: ConfigDict, parts: Iterable[str]) -> str | None:
    """The split for evaluation: config.eval_split, or else the other one; None without either."""
    wanted = (config.eval_split, "validation", "test")
    return next((part for part in wanted if part in parts), None)


def image_files(root: Path, config: ConfigDict) -> tuple[dict[str, ImageFiles], tuple[str, ...]]:
    """The training split, the evaluation split, and the classes of a folder of images.

    train/ and validation/ or test/ (or other usual names) are the splits, and the folders in each
    are the classes. Without a folder for evaluation, a hash of its path decides whether a file is
    in the fraction `config.eval_fraction` for evaluation, so that adding files moves no other file.
    The examples are in the order of these hashes. Raises a UserError if the folder has another
    form, and an OSError if something cannot be read.
    """
    parts: dict[str, Path] = {}
    others: list[Path] = []
    for folder in _folders(root):
        part = PARTS.get(folder.name.lower())
        if part and _folders(folder):  # a class called "train" has no folders
            if part in parts:
                raise UserError(f"{root} has both {parts[part].name} and {folder.name}; keep one")
            parts[part] = folder
        else:
            others.append(folder)
    if "train" not in parts:
        parts = {"train": root}
    elif others:
        warn("left out %s, which is not a split", printable(others[0]))
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
    return {
        name: ImageFiles(parts[name], [example[1:] for example in examples])
        for name, examples in listed.items()
    }, classes


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
                f"{folder} is not a training class ({', '.join(classes)[:200]}); rename or remove "
                "it"
            )
        before = len(found)
        for path in files_below(folder):
            name = path.relative_to(root).as_posix()
            if path.suffix.lower() in ENDINGS:
                found.append((_share(os.fsencode(name)), name, classes.index(folder.name)))
            else:
                others.append(path)
        if len(found) == before:
            raise UserError(f"{folder} has no PNG or JPEG images; add images or remove the folder")
    if shown := [path for path in others if not path.name.startswith(".")]:
        text = "left out, as they are no PNG or JPEG images of a class: %d, such as %s"
        warn(text, len(shown), printable(shown[0]))
    return sorted(found)


def _share(content: bytes) -> float:
    """A hash in 0 .. 1, uniform over contents."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def image_arrays(
    path: Path, config: ConfigDict
) -> tuple[tuple[ResidentSplit, ResidentSplit], tuple[str, ...]]:
    """The training split, the evaluation split, and the classes of an .npz file.

    The file has the arrays `image`, uint8 (N, H, W) or (N, H, W, C), and `label`, int (N,), or both
    per split, such as x_train and y_train. Without a split for evaluation, a hash of each image
    decides. The array `classes` may name the classes. Raises a UserError if the file has another
    form, is damaged or exceeds the memory of this machine.
    """
    try:
        arrays = read_npz(path)
    except UserError:
        raise
    except Exception as error:  # a damaged zip file raises many kinds of errors
        raise UserError(
            f"{path} is no .npz file of arrays ({first_line(error)}); write them by np.savez"
        ) from error
    if config.image_size is not None:
        raise UserError(f"data.image_size resizes image files, not the arrays in {path}; unset it")
    classes = tuple(map(str, arrays.pop("classes", ())))
    parts: dict[str, dict[str, np.ndarray]] = {"train": {}}
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
    train, part = _labelled(path, "train", parts["train"]), evaluation_part(config, parts)
    classes = classes or tuple(map(str, range(int(train["label"].max()) + 1)))
    if part:
        held = _labelled(path, part, parts[part])
    else:
        shares = np.array([_share(image.tobytes()) for image in train["image"]])
        chosen = shares < config.eval_fraction
        held = {name: array[chosen] for name, array in train.items()}
        train = {name: array[~chosen] for name, array in train.items()}
    return (ResidentSplit(train), ResidentSplit(held)), classes


def _labelled(path: Path, part: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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
    image = image.reshape(*image.shape[:3], -1)
    return {"image": image, "label": label.reshape(-1).astype(np.int32)}
