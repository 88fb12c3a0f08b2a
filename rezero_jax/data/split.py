"""The interface of every data set: batches by the indices of their examples."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rezero_jax.errors import UserError

HostBatch = dict[str, np.ndarray]
Rows = slice | np.ndarray  # some rows of a batch: a slice, or their numbers, int (rows,)
ALL = slice(None)
Batch = dict[str, jax.Array]


class Split(abc.ABC):
    """The training or the evaluation examples of a data set, read by index.

    A training loop puts `resident` on the device once, moves there what `batches` yields for each
    step, and calls `gather` inside its jitted step.
    """

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of examples."""

    @property
    def resident(self) -> Mapping[str, np.ndarray]:
        """Arrays that stay on the device for the whole run; by default none."""
        return {}

    @abc.abstractmethod
    def fetch(self, indices: np.ndarray, step: int = 0, rows: Rows = ALL) -> HostBatch:
        """What travels to the device for these examples, each array with a leading axis of them.

        Args:
          indices: of the examples, int (B,).
          step: the number of the update, from which random windows and crops are drawn.
          rows: the rows of the batch to return; their values do not depend on this choice.

        Raises:
          IndexError: an index is outside 0 .. size - 1.
        """

    def batches(
        self, indices: Callable[[int], np.ndarray], first: int, last: int, rows: Rows = ALL
    ) -> Iterator[HostBatch]:
        """`fetch(indices(step), step, rows)` for step = first .. last - 1, perhaps read ahead.

        `indices` must be a pure function, because other threads may call it early.
        """
        return (self.fetch(indices(step), step, rows) for step in range(first, last))

    @abc.abstractmethod
    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        """The batch itself, from `resident` and what `fetch` returned, on the device; traceable.

        A batch of images is "image", uint8 (B, H, W, C), and "label", int32 (B,).
        """


@dataclasses.dataclass(frozen=True, eq=False)
class ResidentSplit(Split):
    """A split small enough to live on the device: only indices travel."""

    arrays: Mapping[str, np.ndarray]  # the leading axis is the example

    @property
    def size(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def resident(self) -> Mapping[str, np.ndarray]:
        """`arrays`, with one axis for everything that an example contains.

        A TPU gathers their rows in place, but would copy an array of images in every dispatch.
        """
        return {name: x.reshape(len(x), -1) if x.ndim > 1 else x for name, x in self.arrays.items()}

    def fetch(self, indices: np.ndarray, step: int = 0, rows: Rows = ALL) -> HostBatch:
        """{"index": int32 (B,)}."""
        check_range(indices, self.size)
        return {"index": np.asarray(indices[rows], np.int32)}

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        batch = {name: jnp.take(x, fetched["index"], axis=0) for name, x in resident.items()}
        return {name: x.reshape(-1, *self.arrays[name].shape[1:]) for name, x in batch.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image data set: its two splits and what a model must know about it.

    Raises:
      UserError: mean or std does not fit the channels, an std is not positive, resident images are
        not uint8 of example_shape, or a resident label is not in 0 .. num_classes - 1. Streamed
        examples are checked as they are fetched.
    """

    name: str
    train: Split
    eval: Split
    example_shape: tuple[int, ...]  # (H, W, C)
    num_classes: int
    mean: tuple[float, ...]  # (C,), of pixels scaled to 0 .. 1
    std: tuple[float, ...]  # (C,)

    def __post_init__(self) -> None:
        channels = self.example_shape[-1]
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise UserError(
                    f"data.{field} has {len(values)} values and the images of "
                    f'"{self.name}" have {channels} channels; give {channels}'
                )
        if not all(value > 0 for value in self.std):
            raise UserError(f"data.std={self.std} must be positive; divide by numbers above 0")
        for split in (self.train, self.eval):
            if isinstance(split, ResidentSplit):
                image, shape = split.arrays["image"], tuple(self.example_shape)
                if (image.dtype, image.shape[1:]) != (np.uint8, shape):
                    raise UserError(
                        f'data set "{self.name}" has images of {image.dtype} {image.shape[1:]}; '
                        f"make them uint8, 0 .. 255, of its example_shape {shape}"
                    )
                check_labels(self.name, split.arrays["label"], self.num_classes)


def check_range(indices: np.ndarray, size: int) -> None:
    """Raises IndexError for an index outside 0 .. size - 1, which a device gather does not do."""
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"example indices must be in 0 .. {size - 1}")


def check_labels(name: str, label: np.ndarray, num_classes: int) -> None:
    """Raises UserError for a label outside 0 .. num_classes - 1, which no loss would notice."""
    wrong = label[(label < 0) | (label >= num_classes)]
    if len(wrong):
        raise UserError(
            f'data set "{name}" has the label {wrong[0]}, which is not in 0 .. {num_classes - 1}; '
            "correct the label or num_classes"
        )


def standardise(image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """(image / 255 - mean) / std, traceable: (..., C) in 0 .. 255 to float32 (..., C)."""
    scaled = image.astype(jnp.float32) / 255
    shape = (1,) * (image.ndim - 1) + (-1,)  # explicit, for strict rank promotion
    return (scaled - jnp.reshape(jnp.float32(mean), shape)) / jnp.reshape(jnp.float32(std), shape)
