"""A split read from disk batch by batch, decoded ahead by threads or worker processes of Grain."""

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from rezero_jax.data.split import ALL, Batch, HostBatch, Rows, Split, check_labels, check_range
from rezero_jax.errors import UserError


@runtime_checkable  # for type checkers at run time
class DataSource(Protocol):
    """Random access to encoded examples, from several threads at once (as in Grain)."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitems__(self, keys: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """The examples at `keys`, each {"image": what `pixels` takes, "label": int}."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamSplit(Split):
    """A split too large to live on the device: decoded images travel for each batch.

    `threads` of this process, or `workers` processes with one thread each, keep up to `ahead`
    batches decoded beyond the one in use. The batches are the same.

    `pixels` is a pure, thread-safe function (encoded image, step, position in the batch) -> uint8
    (H, W, C). `name` and `num_classes` are for errors; None leaves labels unchecked.
    """

    source: DataSource
    threads: int = min(8, os.cpu_count() or 1)
    ahead: int = 16
    pixels: Callable[[Any, int, int], np.ndarray] = lambda image, step, position: image
    name: str = "stream"
    num_classes: int | None = None
    workers: int = 0

    @property
    def size(self) -> int:
        return len(self.source)

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
        if len(shapes := sorted({image.shape for image in images})) > 1:
            raise UserError(
                f'data set "{self.name}" has images of shapes {shapes[0]} and {shapes[1]}, which '
                "make no batch; crop or resize them to one shape"
            )
        return {"image": np.stack(images), "label": label}

    def batches(
        self, indices: Callable[[int], np.ndarray], first: int, last: int, rows: Rows = ALL
    ) -> Iterator[HostBatch]:
        """See Split.batches; closing the iterator, or dropping it, stops the workers."""
        import grain
        from absl import flags

        read = functools.partial(self._read, indices, rows)
        steps = grain.MapDataset.range(first, max(first, last)).map(read)
        if not self.workers:
            options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead)
            iterator = iter(steps.to_iter_dataset(options))
        else:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its own absl flags, which nobody sets
            # Each worker keeps `ahead` batches ready, and this process `ahead` more of each worker.
            ahead = max(self.ahead // (2 * self.workers), 1)
            own = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            workers = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=ahead)
            dataset = steps.to_iter_dataset(own).mp_prefetch(workers, worker_init_fn=_start_worker)
            iterator = iter(dataset)
        try:
            batch = _without_signals(lambda: next(iterator, None))  # starts the workers
            while batch is not None:
                yield batch
                batch = next(iterator, None)
        except UserError as error:  # Grain appends lines about its traceback
            raise UserError(str(error).splitlines()[0]) from None
        finally:
            iterator.close()

    def _read(self, indices: Callable[[int], np.ndarray], rows: Rows, step: int) -> HostBatch:
        return self.fetch(indices(step), step, rows)

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        return dict(fetched)


def _without_signals(call: Callable[[], Any]) -> Any:
    """Calls a function; processes that it starts ignore SIGINT and SIGTERM.

    A terminal or a job sends these signals to all processes of a run. New processes inherit the
    signals that this thread blocks; other threads receive them meanwhile.
    """
    resource_tracker.ensure_running()  # starting it later would end the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return call()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    """Hides the accelerators from a worker, and ends it with the process that started it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
