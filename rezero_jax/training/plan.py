"""What a run will need and how long it will take, before it is trained."""

import math
import time
from itertools import islice

import jax
from ml_collections import ConfigDict

from rezero_jax.data import stand_in
from rezero_jax.formatting import duration
from rezero_jax.training.cost import named
from rezero_jax.training.sharding import device_bytes
from rezero_jax.training.trainer import Trainer

USUAL = 0.4  # of its peak is what an accelerator does in a well-made training


def plan(config: ConfigDict, accelerator: str | None = None) -> str:
    """The account of the run that `config` describes, as lines of text.

    Memory is that of one device, as compiled here for the mesh of the config. The time is that of
    the updates alone: measured here, on a state that is discarded, or computed from the peak of the
    accelerator if one is named.

    Args:
      accelerator: one of cost.ACCELERATORS.

    Raises:
      UserError: the accelerator is unknown, or anything in the config is invalid.
    """
    chip = None if accelerator is None else named(accelerator)
    trainer = trainer_for_sizes(config)
    times, shapes = trainer.intervals, trainer.shapes
    gradients = device_bytes(shapes["params"])
    memory = trainer.compile().memory_analysis()
    activations = max(memory.temp_size_in_bytes - gradients, 0) if memory is not None else 0
    flops = trainer.flops()
    mesh = trainer.mesh
    spread = "spread over data" if config.mesh.fully_sharded else "whole on each along data"
    rows = [
        ("parameters", f"{trainer.spec.parameter_count:,}"),
        (
            "devices",
            f"{mesh.size} x {jax.devices()[0].device_kind} (data {mesh.shape['data']}, model "
            f"{mesh.shape['model']}; the state {spread})",
        ),
        ("updates", f"{times.total:,} of {times.batch_size:,} examples"),
        ("bytes of a device", ""),
        ("  parameters", _size(device_bytes(shapes["params"]))),
        ("  optimizer state", _size(device_bytes(shapes["opt_state"]))),
        ("  gradients", _size(gradients)),
        ("  activations", f"{_size(activations)}, with all that is temporary"),
        ("  data", _size(trainer.resident_bytes)),
        ("FLOPs of an update", f"{flops:.3g}, in matrix products and convolutions"),
    ]
    if chip is None:
        seconds = _seconds_per_update(trainer)
        rows += [
            ("an update", f"{seconds:.3g} s, {flops / seconds:.3g} FLOP/s (measured here)"),
            ("the run", duration(times.total * seconds)),
        ]
    else:
        dtype = config.model.dtype
        usual = usual_seconds(times.total * flops, mesh.size * chip.peak(dtype))
        best = usual * USUAL
        rows += [
            ("the run", f"{duration(usual)} at {USUAL:.0%} of {chip.peak(dtype):.3g} FLOP/s"),
            ("  at best", f"{duration(best)} on {mesh.size} x {chip.kind} in {dtype}"),
            ("  memory", f"{_size(int(chip.memory))} on each"),
        ]
    return "\n".join(f"{name:<20}{value}".rstrip() for name, value in rows)


def trainer_for_sizes(config: ConfigDict) -> Trainer:
    """The Trainer of a config on zeros instead of a data set that would have to be downloaded.

    Raises:
      UserError: anything in the config is invalid.
    """
    dataset = stand_in(config.data)
    return Trainer.from_config(config) if dataset is None else Trainer(config, dataset)


def usual_seconds(flops: float, peak: float) -> float:
    """How long so many floating-point operations take at USUAL of a peak rate."""
    return flops / (USUAL * peak)


def _seconds_per_update(trainer: Trainer) -> float:
    per_dispatch = trainer.config.train.steps_per_dispatch
    batches = trainer.batches(0)
    state = trainer.init()
    seconds = math.inf
    for _ in range(3):  # the first one compiles
        many = list(islice(batches, per_dispatch))
        if not many:
            break
        started = time.perf_counter()
        state, report = trainer.dispatch(state, many)
        jax.block_until_ready((state, report))
        seconds = min(seconds, (time.perf_counter() - started) / len(many))
    return seconds


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
