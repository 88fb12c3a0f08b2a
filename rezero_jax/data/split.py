"""What every data set offers: a batch by the indices of its examples."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from rezero_jax.errors import UserError

HostBatch = dict[str, np.ndarray]
Rows = slice | np.ndarray  # some rows of a batch: a slice, or their numbers, int (rows,)
ALL = slice(None)
Batch = dict[str, jax.Array]


@runtime_checkable
class Split(Protocol):
    """One part (train or eval) of a data set, read by example index.

    A loop puts `resident` on the device once, moves there what `batches` yields for each step, and
    calls `gather` inside its jitted step.
    """

    @property
    def size(self) -> int:
        """The number of examples."""

    @property
    def resident(self) -> Mapping[str, np.ndarray]:
        """Arrays to keep on the device for the whole run; empty for a stream. See `flat`."""

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

        `indices` must be a pure function: it may be called early and from other threads.
        """

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        """The batch itself, from `resident` and what `fetch` returned, on the device; traceable.

        For images: "image" uint8 (B, H, W, C) and "label" int32 (B,).
        """


def flat(resident: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Resident arrays with one axis for all that an example holds, as `gather` takes them, too.

    A TPU gathers rows of such an array as it lies; one of images it would first copy, all of it and
    in every dispatch, into a layout that has the examples last.
    """
    return {name: x.reshape(len(x), -1) if x.ndim > 1 else x for name, x in resident.items()}


def check_range(indices: np.ndarray, size: int) -> None:
    """Raises IndexError for an index outside 0 .. size - 1, which a device gather does not do."""
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"example indices must lie in 0 .. {size - 1}")


def check_labels(name: str, label: np.ndarray, num_classes: int) -> None:
    """Raises UserError for a label outside 0 .. num_classes - 1, which no loss would notice."""
    wrong = label[(label < 0) | (label >= num_classes)]
    if len(wrong):
        raise UserError(
            f'data set "{name}" has the label {wrong[0]}, which is not in 0 .. {num_classes - 1}; '
            "correct the label or num_classes"
        )


def fetch_in_turn(
    split: Split, indices: Callable[[int], np.ndarray], first: int, last: int, rows: Rows = ALL
) -> Iterator[HostBatch]:
    """The `batches` of a split that reads nothing ahead."""
    return (split.fetch(indices(step), step, rows) for step in range(first, last))


@dataclasses.dataclass(frozen=True, eq=False)
class ResidentSplit:
    """A split small enough to live on the device: only indices travel.

    `resident` maps each name to an array whose leading axis is the example.
    """

    resident: Mapping[str, np.ndarray]

    batches = fetch_in_turn

    @property
    def size(self) -> int:
        return len(next(iter(self.resident.values())))

    def fetch(self, indices: np.ndarray, step: int = 0, rows: Rows = ALL) -> HostBatch:
        """{"index": int32 (B,)}."""
        check_range(indices, self.size)
        return {"index": np.asarray(indices[rows], np.int32)}

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        batch = {name: jnp.take(x, fetched["index"], axis=0) for name, x in resident.items()}
        shapes = {name: x.shape[1:] for name, x in self.resident.items()}
        return {name: x.reshape(-1, *shapes[name]) for name, x in batch.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image data set: its two splits and what a model must know about it.

    `example_shape` is (H, W, C) of the uint8 images; `mean` and `std` are per channel, for pixels
    scaled to 0 .. 1.

    Raises:
      UserError: resident images are not uint8 of example_shape, or a resident label is not in
          0 .. num_classes - 1. Streamed examples are checked as they are fetched.
    """

    name: str
    train: Split
    eval: Split
    example_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for arrays in (self.train.resident, self.eval.resident):
            if not arrays:
                continue
            images, shape = f'data set "{self.name}" has images of', arrays["image"].shape[1:]
            if (dtype := arrays["image"].dtype) != np.uint8:
                raise UserError(f"{images} {dtype}; convert them to uint8, 0 .. 255")
            if shape != (given := tuple(self.example_shape)):
                raise UserError(
                    f"{images} shape {shape}, but its example_shape is {given}; make the two agree"
                )
            check_labels(self.name, arrays["label"], self.num_classes)


def standardise(image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """(image / 255 - mean) / std, traceable: (..., C) in 0 .. 255 to float32 (..., C)."""
    scaled = image.astype(jnp.float32) / 255
    shape = (1,) * (image.ndim - 1) + (-1,)  # explicit, for strict rank promotion
    return (scaled - jnp.reshape(jnp.float32(mean), shape)) / jnp.reshape(jnp.float32(std), shape)
