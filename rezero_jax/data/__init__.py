"""Data sets by name, and the order in which a run visits their examples."""

from rezero_jax.data.datasets import NAMES as NAMES
from rezero_jax.data.datasets import load as load
from rezero_jax.data.datasets import stand_in as stand_in
from rezero_jax.data.order import Order as Order
from rezero_jax.data.order import eval_batches as eval_batches
from rezero_jax.data.split import Dataset as Dataset
from rezero_jax.data.split import ResidentSplit as ResidentSplit
from rezero_jax.data.split import Split as Split
from rezero_jax.data.split import standardise as standardise
from rezero_jax.data.stream import StreamSplit as StreamSplit
from rezero_jax.data.text import Text as Text
from rezero_jax.data.text import TextSplit as TextSplit
