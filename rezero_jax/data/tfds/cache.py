"""A split decoded once into whole arrays, kept as .npy files under the user's cache folder."""

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

    Read from `$XDG_CACHE_HOME/rezero_jax/<key>_*.npy` (~/.cache where that is not set), or decoded
    and written there. A file that cannot be read or does not fit the split is written again.
    """
    root = cache_folder()
    paths = {name: root / f"{key}_{name}.npy" for name in ("image", "label")}
    example = split.fetch(np.arange(1))
    try:
        arrays = {name: np.load(path, allow_pickle=False) for name, path in paths.items()}
        if all(_fits(arrays[name], example[name], split.size) for name in paths):
            return arrays
    except (OSError, ValueError, EOFError):
        pass
    arrays = _decode(key, split)
    try:
        for name, path in paths.items():
            _write(path, arrays[name])
    except OSError as error:
        logging.getLogger(__name__).warning("the decoded %s is not cached: %s", key, error)
    return arrays


def fingerprint(folder: Any) -> str:
    """Twelve hexadecimal digits that change with the data set in a TFDS folder (an etils Path)."""
    digest = hashlib.sha256((folder / "dataset_info.json").read_bytes())
    for path in sorted(folder.glob("*.array_record*")):
        digest.update(f"{path.name} {path.stat().length}\n".encode())
    return digest.hexdigest()[:12]


def _fits(array: np.ndarray, example: np.ndarray, size: int) -> bool:
    return array.dtype == example.dtype and array.shape == (size, *example.shape[1:])


def _decode(key: str, split: StreamSplit) -> dict[str, np.ndarray]:
    example = split.fetch(np.arange(1))
    arrays = {name: np.empty((split.size, *x.shape[1:]), x.dtype) for name, x in example.items()}

    def chunk(number: int) -> np.ndarray:
        return np.arange(number * _CHUNK, min((number + 1) * _CHUNK, split.size))

    bar = tqdm(total=split.size, desc=f"decoding {key}", unit=" images", mininterval=1, delay=1)
    with bar:
        for number, batch in enumerate(split.batches(chunk, 0, -(-split.size // _CHUNK))):
            rows = slice(number * _CHUNK, number * _CHUNK + len(batch["label"]))
            for name, values in batch.items():
                arrays[name][rows] = values
            bar.update(len(batch["label"]))
    return arrays


def _write(path: Path, array: np.ndarray) -> None:
    """Write under a name of its own, then rename: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
