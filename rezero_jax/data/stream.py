"""Streams a split from disk, with images decoded by Grain's threads or worker processes."""

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
from rezero_jax.errors import UserError, first_line


@runtime_checkable  # for type checkers at run time
class DataSource(Protocol):
    """Thread-safe random access to encoded examples, as in Grain."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitems__(self, keys: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """The examples at `keys`, each {"image": argument of `pixels`, "label": int}."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamSplit(Split):
    """A split that does not fit on the device: decoded images are transferred for each batch.

    Attributes:
      source: the encoded examples.
      threads: threads of this process that decode, if there are no `workers`.
      ahead: batches to decode in advance.
      pixels: pure, thread-safe (encoded image, step, position in the batch) -> uint8 (H, W, C).
      name: name of the data set in errors.
      num_classes: bound on labels; None disables the check.
      shape: shape of an image; None: that of the first image of a batch.
      workers: processes that decode, with one thread each.
    """

    source: DataSource
    threads: int = min(8, os.cpu_count() or 1)
    ahead: int = 16
    pixels: Callable[[Any, int, int], np.ndarray] = lambda image, step, position: image
    name: str = "stream"
    num_classes: int | None = None
    shape: tuple[int, ...] | None = None
    workers: int = 0

    @property
    def size(self) -> int:
        return len(self.source)

    def checked(self, name: str, shape: tuple[int, ...], num_classes: int) -> "StreamSplit":
        own = name if self.name == "stream" else self.name
        return dataclasses.replace(self, name=own, shape=shape, num_classes=num_classes)

    def record(self) -> dict[str, Any]:
        files = getattr(self.source, "files", None)  # of the user's own images
        return super().record() | ({"files": files()} if files else {})

    def fetch(self, indices: np.ndarray, step: int = 0, rows: Rows = ALL) -> HostBatch:
        """{"image": uint8 (B, H, W, C), "label": int32 (B,)}.

        Raises a UserError if an image is damaged or not uint8 of `shape`, or a label is invalid.
        """
        check_range(indices, self.size)
        positions = np.arange(len(indices))[rows].tolist()
        try:
            examples = self.source.__getitems__([int(indices[position]) for position in positions])
        except OSError as error:
            why = f"{first_line(error)}); restore its files"
            raise UserError(f'data set "{self.name}" cannot be read ({why}') from error
        label = np.array([example["label"] for example in examples], np.int32)
        if self.num_classes is not None:
            check_labels(self.name, label, self.num_classes)
        images: list[np.ndarray] = []
        for position, example in zip(positions, examples, strict=True):
            file = os.fsdecode(example.get("file_name", f"example {indices[position]}"))
            try:
                image = self.pixels(example["image"], step, position)
            except UserError as error:
                raise UserError(f'{file} of data set "{self.name}" {error}') from error
            shape = self.shape or (images or [image])[0].shape
            if (image.dtype, image.shape) != (np.uint8, shape):
                raise UserError(
                    f'{file} of data set "{self.name}" is an image of {image.dtype} {image.shape}, '
                    f"not uint8 {shape}; set data.image_size, or convert the images to one shape"
                )
            images.append(image)
        return {"image": np.stack(images), "label": label}

    def batches(
        self, indices: Callable[[int], np.ndarray], first: int, last: int, rows: Rows = ALL
    ) -> Iterator[HostBatch]:
        """See Split.batches; closing or deleting the iterator stops the workers."""
        import grain
        from absl import flags

        read = functools.partial(self._read, indices, rows)
        steps = grain.MapDataset.range(first, max(first, last)).map(read)
        if not self.workers:
            options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead)
            iterator = iter(steps.to_iter_dataset(options))
        else:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which may not be parsed
            # Each worker buffers `ahead` batches, and this process `ahead` more per worker.
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
        except UserError as error:  # Grain appends a traceback to the message
            raise UserError(str(error).splitlines()[0]) from None
        finally:
            iterator.close()

    def _read(self, indices: Callable[[int], np.ndarray], rows: Rows, step: int) -> HostBatch:
        return self.fetch(indices(step), step, rows)

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        return dict(fetched)


def _without_signals(call: Callable[[], Any]) -> Any:
    """Calls a function with SIGINT and SIGTERM blocked, so that new processes inherit this.

    A terminal or a job sends them to all processes of a run; the main process alone handles them.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return call()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    """Hides accelerators from a worker, and ends the worker with its parent."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
