"""A split decoded once into whole arrays, kept in a file under the user's cache folder."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rezero_jax.data.stream import StreamSplit
from rezero_jax.devices import cache_folder

_CHUNK = 500  # examples decoded by one worker at a time


def cached_arrays(key: str, split: StreamSplit) -> dict[str, np.ndarray]:
    """All examples of `split`: {"image": uint8 (N, H, W, C), "label": int32 (N,)}.

    Read from `$XDG_CACHE_HOME/rezero_jax/<key>.npz` (~/.cache where that is not set), or decoded
    and written there. A file that is damaged or does not fit the split is written again.
    """
    path = cache_folder() / f"{key}.npz"
    expected = {
        name: (x.dtype, (split.size, *x.shape[1:])) for name, x in split.fetch(np.arange(1)).items()
    }
    warn = logging.getLogger(__name__).warning
    try:
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            arrays = {name: stored[name] for name in expected}  # zip compares their CRC-32
        if {name: (x.dtype, x.shape) for name, x in arrays.items()} == expected:
            return arrays
        warn("%s holds other data; the images are decoded again", path)
    except OSError:
        pass
    except Exception as error:  # a damaged zip file raises errors of many kinds
        warn("%s is damaged (%s); the images are decoded again", path, error)
    arrays = _decode(key, split)
    try:
        _write(path, arrays)
    except OSError as error:
        warn("the decoded %s is not cached: %s", key, error)
    return arrays


def fingerprint(folder: Any) -> str:
    """Twelve hexadecimal digits that change with the data set in a TFDS folder (an etils Path)."""
    digest = hashlib.sha256((folder / "dataset_info.json").read_bytes())
    for path in sorted(folder.glob("*.array_record*")):
        digest.update(f"{path.name} {path.stat().length}\n".encode())
    return digest.hexdigest()[:12]


def _decode(key: str, split: StreamSplit) -> dict[str, np.ndarray]:
    starts = range(0, split.size, _CHUNK)
    count = len(starts)
    chunks = split.batches(
        lambda i: np.arange(starts[i], min(starts[i] + _CHUNK, split.size)), 0, count
    )
    bar = tqdm(chunks, f"decoding {key}", count, unit_scale=_CHUNK, unit=" images", delay=1)
    decoded = list(bar)
    return {name: np.concatenate([chunk[name] for chunk in decoded]) for name in decoded[0]}


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write under a name of its own, then rename: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, image=arrays["image"], label=arrays["label"])
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
