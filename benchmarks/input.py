"""Throughput of reading, decoding and cropping ImageNet images, by the number of workers.

    python -m benchmarks.input

Batches have 256 random crops of 224 pixels, from JPEGs in memory of about 110 kB and 500 x 375
pixels, the mean size of ImageNet's images. The numbers of workers (data.workers; 0 is a thread per
core) take turns. "first batch" includes the start of the workers; the rate excludes it. The numbers
are medians, with the range in brackets.
"""

import io
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.worker import spread
from rezero_jax.command import parser, run
from rezero_jax.data import Order, StreamSplit
from rezero_jax.data.pixels import Crop
from rezero_jax.formatting import markdown_table

WORKERS = (0, 1, 2, 4)
WIDTH, HEIGHT, QUALITY = 500, 375, 95
SIZE, BATCH, DISTINCT = 1_281_167, 256, 32


class Jpegs:
    """A stream.DataSource of ImageNet's size, with few distinct images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._files = [_jpeg(rng) for _ in range(DISTINCT)]
        self.kilobytes = sum(map(len, self._files)) / DISTINCT / 1000

    def __len__(self) -> int:
        return SIZE

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": self._files[key % DISTINCT], "label": key % 1000} for key in keys]


def _jpeg(rng: np.random.Generator) -> bytes:
    """Noise whose contrast grows with its scale, as in photographs."""
    pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
    for scale in (128, 64, 32, 16, 8, 4, 2, 1):
        small = rng.normal(size=(-(-HEIGHT // scale), -(-WIDTH // scale), 3))
        pixels += 6 * scale**0.5 * small.repeat(scale, 0).repeat(scale, 1)[:HEIGHT, :WIDTH]
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def measure(source: Jpegs, workers: int, batches: int) -> tuple[float, float]:
    """Seconds to the first batch, and images per second of `batches` after it."""
    order = Order(0, SIZE, BATCH)
    split = StreamSplit(source, os.cpu_count() or 1, 4, Crop(224, 0), workers=workers)
    began = time.perf_counter()
    stream = split.batches(order.indices, 0, 10**6)
    next(stream)
    first = time.perf_counter()
    for _ in range(4):  # discards batches that were read while waiting for the first one
        next(stream)
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - started
    del stream  # ends the workers
    return first - began, batches * BATCH / seconds


def main() -> None:
    """Runs the command line."""
    options = parser("benchmarks.input", __doc__)
    options.add_argument("--turns", type=int, default=3, help="timings per row (default: 3)")
    options.add_argument("--batches", type=int, default=8, help="batches to time (default: 8)")
    args = options.parse_args()
    source = Jpegs()
    print(f"JPEGs of {source.kilobytes:.0f} kB; {os.cpu_count()} cores")
    found: dict[int, list[tuple[float, float]]] = {workers: [] for workers in WORKERS}
    for _ in range(args.turns):
        for workers, values in found.items():
            values.append(measure(source, workers, args.batches))
    rows: list[list[object]] = [["workers", "images/s", "over 0 workers", "first batch, s"]]
    for workers, values in found.items():
        ratios = [rate / base for (_, rate), (_, base) in zip(values, found[0], strict=True)]
        firsts, rates = zip(*values, strict=True)
        rows.append([workers, *(spread(x, form) for x, form in ((rates, ",.0f"), (ratios, ".2f")))])
        rows[-1].append(f"{statistics.median(firsts):.1f}")
    print(markdown_table(rows))


if __name__ == "__main__":
    run(main)
