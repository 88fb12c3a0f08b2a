"""A split read from disk batch by batch, decoded ahead by worker threads (Grain)."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from rezero_jax.data.split import ALL, Batch, HostBatch, Rows, check_labels, check_range
from rezero_jax.errors import UserError


@runtime_checkable
class DataSource(Protocol):
    """Random access to encoded examples, from several threads at once (as in Grain)."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitems__(self, keys: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """The examples at `keys`, each {"image": what `pixels` takes, "label": int}."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamSplit:
    """A split too large to live on the device: decoded images travel for each batch.

    `threads` workers keep up to `ahead` batches decoded beyond the one in use.

    Attributes:
      source: where the examples come from.
      pixels: a pure, thread-safe function (encoded image, step, position in the batch) -> uint8
          (H, W, C); by default for a source that holds such pixels.
      name, num_classes: of the data set, for errors; None leaves labels unchecked.
    """

    source: DataSource
    threads: int = min(8, os.cpu_count() or 1)
    ahead: int = 16
    pixels: Callable[[Any, int, int], np.ndarray] = lambda image, step, position: image
    name: str = "stream"
    num_classes: int | None = None

    @property
    def size(self) -> int:
        return len(self.source)

    @property
    def resident(self) -> Mapping[str, np.ndarray]:
        return {}

    def fetch(self, indices: np.ndarray, step: int = 0, rows: Rows = ALL) -> HostBatch:
        """{"image": uint8 (B, H, W, C), "label": int32 (B,)}.

        Raises:
          IndexError: an index is outside 0 .. size - 1.
          UserError: the images differ in shape, or a label is not in 0 .. num_classes - 1.
        """
        check_range(indices, self.size)
        positions = np.arange(len(indices))[rows].tolist()
        examples = self.source.__getitems__([int(indices[position]) for position in positions])
        label = np.array([example["label"] for example in examples], np.int32)
        if self.num_classes is not None:
            check_labels(self.name, label, self.num_classes)
        images = [
            self.pixels(example["image"], step, position)
            for position, example in zip(positions, examples, strict=True)
        ]
        for image in images:
            if image.shape != images[0].shape:
                raise UserError(
                    f'data set "{self.name}" has images of shapes {images[0].shape} and '
                    f"{image.shape}, which make no batch; crop or resize them to one shape"
                )
        return {"image": np.stack(images), "label": label}

    def batches(
        self, indices: Callable[[int], np.ndarray], first: int, last: int, rows: Rows = ALL
    ) -> Iterator[HostBatch]:
        """See Split; closing the iterator, or dropping it, stops the workers."""
        import grain

        def read(step: int) -> HostBatch:
            return self.fetch(indices(step), step, rows)

        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead)
        steps = grain.MapDataset.range(first, max(first, last))
        iterator = iter(steps.map(read).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        return dict(fetched)
