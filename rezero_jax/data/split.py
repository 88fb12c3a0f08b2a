"""The interface of every data set: batches by the indices of their examples."""

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rezero_jax.errors import UserError

HostBatch = dict[str, np.ndarray]
Rows = slice | np.ndarray  # selects rows of a batch: a slice, or int (rows,)
ALL = slice(None)
Batch = dict[str, jax.Array]


class Split(abc.ABC):
    """The training or evaluation examples of a data set, read by index.

    A training loop puts `resident` on the device once, transfers an element of `batches` for each
    step, and calls `gather` within its jitted step.
    """

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of examples."""

    def checked(self, name: str, shape: tuple[int, ...], num_classes: int) -> "Split":
        """The split of a data set called `name`, after a check of its images and labels.

        Streamed examples are checked when they are fetched. Raises a UserError if an image is not
        uint8 of `shape`, or a label not in 0 .. num_classes - 1.
        """
        return self

    @property
    def resident(self) -> Mapping[str, np.ndarray]:
        """Arrays that remain on the device for the whole run (default: none)."""
        return {}

    def record(self) -> dict[str, Any]:
        """What a run records of the split: its size and, if it is known, a hash of its content."""
        return {"examples": self.size}

    @abc.abstractmethod
    def fetch(self, indices: np.ndarray, step: int = 0, rows: Rows = ALL) -> HostBatch:
        """The arrays to transfer to the device for a batch; their leading axis is the example.

        Args:
          indices: indices of the examples, int (B,).
          step: number of the update, which determines random windows and crops.
          rows: rows of the batch to return; their values do not depend on this choice.

        Raises:
          IndexError: an index is outside 0 .. size - 1.
        """

    def batches(
        self, indices: Callable[[int], np.ndarray], first: int, last: int, rows: Rows = ALL
    ) -> Iterator[HostBatch]:
        """Yields `fetch(indices(step), step, rows)` for step = first .. last - 1.

        Other threads may call `indices` ahead of time, so it must be a pure function.
        """
        return (self.fetch(indices(step), step, rows) for step in range(first, last))

    @abc.abstractmethod
    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        """Assembles the batch from `resident` and the result of `fetch` on the device; traceable.

        A batch of images has "image", uint8 (B, H, W, C), and "label", int32 (B,).
        """


@dataclasses.dataclass(frozen=True, eq=False)
class ResidentSplit(Split):
    """A split that fits on the device: only indices are transferred."""

    arrays: Mapping[str, np.ndarray]  # the leading axis is the example

    @property
    def size(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def resident(self) -> Mapping[str, np.ndarray]:
        """`arrays` with flattened examples: a TPU would copy 4-D images in every dispatch."""
        return {name: x.reshape(len(x), -1) if x.ndim > 1 else x for name, x in self.arrays.items()}

    def checked(self, name: str, shape: tuple[int, ...], num_classes: int) -> "ResidentSplit":
        image = self.arrays["image"]
        if (image.dtype, image.shape[1:]) != (np.uint8, shape):
            raise UserError(
                f'data set "{name}" has images of {image.dtype} {image.shape[1:]}; convert them to '
                f"uint8, 0 .. 255, of example_shape {shape}"
            )
        check_labels(name, self.arrays["label"], num_classes)
        return self

    def record(self) -> dict[str, Any]:
        return super().record() | {"content": content_hash(*self.arrays.values())}

    def fetch(self, indices: np.ndarray, step: int = 0, rows: Rows = ALL) -> HostBatch:
        """{"index": int32 (B,)}."""
        check_range(indices, self.size)
        return {"index": np.asarray(indices[rows], np.int32)}

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        batch = {name: jnp.take(x, fetched["index"], axis=0) for name, x in resident.items()}
        return {name: x.reshape(-1, *self.arrays[name].shape[1:]) for name, x in batch.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image data set: its two splits, and their shapes, classes and statistics.

    Raises a UserError if mean, std, or resident images or labels are invalid; see `Split.checked`.

    Examples:
      >>> from rezero_jax.data import Dataset, ResidentSplit
      >>> images, labels = np.zeros((30, 8, 8, 3), np.uint8), np.arange(30, dtype=np.int32) % 10
      >>> both = ResidentSplit({"image": images, "label": labels})
      >>> mine = Dataset("mine", both, both, (8, 8, 3), 10, mean=(0.5,) * 3, std=(0.5,) * 3)
    """

    name: str
    train: Split
    eval: Split
    example_shape: tuple[int, ...]  # (H, W, C)
    num_classes: int
    mean: tuple[float, ...]  # (C,), of pixels scaled to 0 .. 1
    std: tuple[float, ...]  # (C,)
    classes: tuple[str, ...] = ()  # names of the classes, if they are known

    def __post_init__(self) -> None:
        channels = self.example_shape[-1]
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise UserError(
                    f"data.{field} has {len(values)} values, but the images of "
                    f'"{self.name}" have {channels} channels; give {channels} values'
                )
        if not all(value > 0 for value in self.std):
            raise UserError(f"data.std={self.std} is not positive; give numbers above 0")
        shape = tuple(self.example_shape)
        for part, split in (("train", self.train), ("eval", self.eval)):
            checked = split.checked(self.name, shape, self.num_classes)
            object.__setattr__(self, part, checked)  # the class is frozen

    def record(self) -> dict[str, Any]:
        """What a run records of its data, as JSON: the fields and, per split, `Split.record`."""
        names = ("name", "example_shape", "num_classes", "classes", "mean", "std")
        fields = {name: getattr(self, name) for name in names}
        return fields | {"train": self.train.record(), "eval": self.eval.record()}


def content_hash(*arrays: np.ndarray) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the arrays' bytes, one after another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def check_range(indices: np.ndarray, size: int) -> None:
    """Raises IndexError for an index outside 0 .. size - 1; a device gather would not."""
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"example indices must be in 0 .. {size - 1}")


def check_labels(name: str, label: np.ndarray, num_classes: int) -> None:
    """Raises UserError for a label outside 0 .. num_classes - 1, which a loss would not detect."""
    wrong = label[(label < 0) | (label >= num_classes)]
    if len(wrong):
        raise UserError(
            f'data set "{name}" has the label {wrong[0]}, which is not in 0 .. {num_classes - 1}; '
            "correct the label or num_classes"
        )


def standardise(image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Maps pixels (..., C) in 0 .. 255 to (image / 255 - mean) / std in float32; traceable."""
    scaled = image.astype(jnp.float32) / 255
    shape = (1,) * (image.ndim - 1) + (-1,)  # explicit, for strict rank promotion
    return (scaled - jnp.reshape(jnp.float32(mean), shape)) / jnp.reshape(jnp.float32(std), shape)
