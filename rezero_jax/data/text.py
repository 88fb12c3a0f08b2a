"""Text as bytes: training windows, and evaluation windows that score each byte exactly once."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rezero_jax.data.order import SplitMix64
from rezero_jax.data.split import ALL, Batch, HostBatch, Rows, Split, check_range, content_hash
from rezero_jax.data.text_files import LONGEST, enwik8_text, stdlib_text, user_text
from rezero_jax.errors import UserError, check_between, check_choice

EVAL_SPLITS = ("validation", "test")
TEXT_NAMES = ("enwik8", "stdlib", "text")
WINDOWS = ("segments", "random")

_STREAM = 0x7E87  # separates the random numbers for windows from those for shuffling


@dataclasses.dataclass(frozen=True, eq=False)
class TextSplit(Split):
    """Windows of T = `length` bytes of a text of N bytes; the whole text is on the device.

    The target at position p is byte p of the text; the input is the byte before it, or 0.

    For training (`whole` is False), the examples are the N // T full segments: example i has the
    targets i T .. (i+1) T - 1. With `random`, each example is instead a window at a random start,
    drawn from (seed, step).

    For evaluation (`whole` is True), example i scores the S = T - context targets
    i S .. (i+1) S - 1, up to the end of the text. Its window starts `context` targets earlier, and
    is shifted to be within the text. Each byte is thus scored once, after at least `context` bytes
    or all bytes that precede it.

    Raises a UserError if length, context or the length of the text is out of range.
    """

    text: np.ndarray  # uint8 (N,), N at most 2,147,483,646
    length: int  # 1 .. N
    context: int = 0  # 0 .. T - 1
    random: bool = False
    seed: int = 0
    whole: bool = False
    name: str = "text"  # in errors

    def __post_init__(self) -> None:
        _check_window(self.length, self.context)
        if not self.length <= len(self.text) <= LONGEST:
            raise UserError(
                f"{self.name} has {len(self.text)} bytes; give a text of data.length={self.length} "
                f"to {LONGEST} bytes"
            )

    @property
    def size(self) -> int:
        if self.whole:
            return -(-len(self.text) // (self.length - self.context))
        return len(self.text) // self.length

    @property
    def resident(self) -> Mapping[str, np.ndarray]:
        """{"text": uint8 (N + 1,)}: the start byte and the text."""
        return {"text": np.concatenate([np.zeros(1, np.uint8), self.text])}

    def record(self) -> dict[str, Any]:
        return {"bytes": len(self.text), "content": content_hash(self.text)}

    def fetch(self, indices: np.ndarray, step: int = 0, rows: Rows = ALL) -> HostBatch:
        """Positions, int32 (B,): "start", the first target; if `whole`, "first" and "last".

        The targets first .. last - 1 are scored.
        """
        check_range(indices, self.size)
        count, example = len(self.text), np.asarray(indices, np.int64)
        if self.whole:
            first = example * (self.length - self.context)
            last = np.minimum(first + self.length - self.context, count)
            start = np.clip(first - self.context, 0, count - self.length)
            positions = {"start": start, "first": first, "last": last}
        elif self.random:
            draws = SplitMix64(self.seed, step, _STREAM)
            positions = {"start": draws.integers(count - self.length + 1, size=len(example))}
        else:
            positions = {"start": example * self.length}
        return {name: values[rows].astype(np.int32) for name, values in positions.items()}

    def gather(self, resident: Mapping[str, jax.Array], fetched: Mapping[str, jax.Array]) -> Batch:
        """{"tokens", "targets"}: inputs and targets, int32 (B, T) in 0 .. 255; traceable.

        If `whole`, also "weight", float32 (B, T): 1 for targets that are scored, else 0.
        """
        start = fetched["start"][:, None]
        position = start + jnp.arange(self.length + 1, dtype=jnp.int32)[None, :]
        window = jnp.take(resident["text"], position, axis=0).astype(jnp.int32)
        batch = {"tokens": window[:, :-1], "targets": window[:, 1:]}
        if self.whole:
            target = position[:, :-1]
            counts = (fetched["first"][:, None] <= target) & (target < fetched["last"][:, None])
            batch["weight"] = counts.astype(jnp.float32)
        return batch


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A text data set: two splits with windows of one length."""

    name: str
    train: TextSplit
    eval: TextSplit

    @property
    def largest(self) -> int:
        """The largest byte value in the two splits."""
        return int(max(self.train.text.max(), self.eval.text.max()))

    def record(self) -> dict[str, Any]:
        """What a run records of its data, as JSON; see `Split.record`."""
        return {"name": self.name, "train": self.train.record(), "eval": self.eval.record()}


def read_text(config: ConfigDict, download: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Reads the bytes of the training split and of config.eval_split, uint8 (N,) each.

    "enwik8" and "text" are divided into 90 % training, 5 % validation and 5 % test; `stdlib_files`
    divides "stdlib".
    """
    if config.name == "stdlib":
        return stdlib_text("train"), stdlib_text(config.eval_split)
    text = enwik8_text(config.dir, download) if config.name == "enwik8" else user_text(config.path)
    return _divided(text, config.eval_split)


def load_text(
    config: ConfigDict, seed: int = 0, text: np.ndarray | None = None, download: bool = True
) -> Text:
    """Loads the text that config.data names; `text`, uint8 (N,), replaces its bytes if given."""
    check_choice("data.windows", config.windows, WINDOWS)
    _check_window(config.length, config.context)  # before anything is downloaded
    train, held = read_text(config, download) if text is None else _divided(text, config.eval_split)
    length, random = config.length, config.windows == "random"
    names = [f"the {split} split of {config.name}" for split in ("train", config.eval_split)]
    return Text(
        config.name,
        TextSplit(train, length, random=random, seed=seed, name=names[0]),
        TextSplit(held, length, config.context, whole=True, name=names[1]),
    )


def _divided(text: np.ndarray, eval_split: str) -> tuple[np.ndarray, np.ndarray]:
    train, validation, test = np.split(text, [len(text) * percent // 100 for percent in (90, 95)])
    return train, validation if eval_split == "validation" else test


def _check_window(length: int, context: int) -> None:
    check_between(1, length, LONGEST, "data.length")
    check_between(0, context, length - 1, "data.context")
