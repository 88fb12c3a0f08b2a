"""The networks and meshes of docs/scaling.md."""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from ml_collections import ConfigDict

from benchmarks.roofline import Machine, Step, step
from benchmarks.work import Layout, Work
from rezero_jax.config import load_config

PAPER = f"{Path(__file__).parents[1] / 'configs' / 'transformer_enwik8.py'}:layers=128"
# Name, fields beside those of the paper's, examples of a device, devices along `model`.
NETWORKS = {
    "128 layers": ({}, 18, 2),
    "1B": (
        {
            "model.width": 2048,
            "model.depth": 20,
            "model.heads": 16,
            "model.max_len": 2048,
            "model.dropout": 0.0,
            "data.length": 2048,
            "optim.name": "adamw",
        },
        4,
        4,
    ),
}
SMALL = {
    "model.width": 64,
    "model.depth": 6,
    "model.heads": 4,
    "model.max_len": 32,
    "data.length": 32,
    "model.dropout": 0.0,
    "train.batch_size": 16,
    "train.epochs": None,
    "train.steps": 1,
    "eval.every_epochs": None,
}
# Name, layout, parts in which the batch is accumulated.
SMALL_LAYOUTS = (
    ("data=8", Layout(8), 1),
    ("data=8, accumulate=2", Layout(8), 2),
    ("data=8, fully sharded", Layout(8, fully_sharded=True), 1),
    ("model=4", Layout(1, model=4), 1),
    ("data=2, model=4", Layout(2, model=4), 1),
)


def config_of(fields: Mapping[str, object]) -> ConfigDict:
    """The paper's 128 layers with other fields."""
    return load_config(PAPER, [f"{key}={value}" for key, value in fields.items()])


@cache
def work(network: str) -> Work:
    """The work of a device on one of NETWORKS, in bfloat16 and with remat="full"."""
    fields, batch, _ = NETWORKS[network]
    return Work.of(config_of({"model.dtype": "bfloat16", "train.accumulate": 1} | fields), batch)


def layouts(network: str, count: int) -> dict[str, Layout]:
    """The meshes compared, of `count` devices."""
    model = NETWORKS[network][2]
    found = {"data": Layout(count), "fully sharded": Layout(count, fully_sharded=True)}
    if count % model == 0:
        found[f"model={model}"] = Layout(count // model, model)
    return found


def steps(network: str, machine: Machine) -> Iterator[tuple[str, Layout, Step]]:
    """The step on the whole machine, for each mesh."""
    shape = machine.slices[-1]
    for name, layout in layouts(network, math.prod(shape)).items():
        yield name, layout, step(work(network), machine, shape, layout)


def total_bytes(network: str, layout: Layout) -> int:
    """Of a device, with remat="full"."""
    state = work(network).state_bytes(layout)
    activations = work(network).activation_bytes(layout, "full")
    return 2 * state["params"] + state["opt_state"] + activations
