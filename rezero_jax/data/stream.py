"""A split read from disk batch by batch, decoded ahead by worker threads (Grain)."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from rezero_jax.data.source import Batch, HostBatch, check_range


class Records(Protocol):
    """Random access to decoded examples; must be safe to call from several threads."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitems__(self, keys: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """The examples at `keys`, each {"image": uint8 (H, W, C), "label": int}."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamSplit:
    """A split too large to live on the device: decoded images travel for each batch.

    `threads` workers keep up to `ahead` batches decoded beyond the one in use.
    """

    records: Records
    threads: int = min(8, os.cpu_count() or 1)
    ahead: int = 16

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.records)

    @property
    def resident(self) -> Mapping[str, np.ndarray]:
        """Nothing: see Split."""
        return {}

    def fetch(self, indices: np.ndarray) -> HostBatch:
        """{"image": uint8 (B, H, W, C), "label": int32 (B,)}; see Split."""
        check_range(indices, self.size)
        examples = self.records.__getitems__([int(index) for index in indices])
        return {
            "image": np.stack([example["image"] for example in examples]),
            "label": np.array([example["label"] for example in examples], np.int32),
        }

    def batches(
        self, indices: Callable[[int], np.ndarray], first: int, last: int
    ) -> Iterator[HostBatch]:
        """`fetch(indices(step))` for step = first .. last - 1, in order, decoded ahead.

        Closing the iterator (or dropping it) stops the workers.
        """
        import grain

        dataset = grain.MapDataset.source(_Batches(self, indices, first, last))
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead)
        iterator = iter(dataset.to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        """The fetched batch as it is; traceable."""
        return dict(fetched)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
    """The run's batches as a Grain source: element i is the batch of step first + i."""

    split: StreamSplit
    indices: Callable[[int], np.ndarray]
    first: int
    last: int

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __getitem__(self, element: int) -> HostBatch:
        return self.split.fetch(self.indices(self.first + int(element)))
