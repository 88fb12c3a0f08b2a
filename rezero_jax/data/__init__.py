"""Data sets by name, and the order in which a run visits their examples."""

from rezero_jax.data.datasets import NAMES, load, stand_in
from rezero_jax.data.order import Order, eval_batches
from rezero_jax.data.split import Dataset, ResidentSplit, Split, standardise
from rezero_jax.data.stream import StreamSplit
from rezero_jax.data.text import Text, TextSplit

__all__ = [
    "NAMES",
    "Dataset",
    "Order",
    "ResidentSplit",
    "Split",
    "StreamSplit",
    "Text",
    "TextSplit",
    "eval_batches",
    "load",
    "stand_in",
    "standardise",
]
