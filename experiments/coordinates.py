"""The coordinate check: how much activations change with depth or width while training begins.

A coordinate is a number of what the last layer returns, before a final norm. For every rule and
size the command measures the mean |x| over the coordinates of 16 examples of the evaluation split,
before the first update and after each of the first, and the mean |x - x_0| from the value before
them. Where hyperparameters transfer, these change by as much at every size: the slope of log
|x - x_0| over log size is 0. (arXiv 2505.01618, figure 7, shows |x| by depth for tiny Shakespeare.)
Seeds differ in the initial weights, and see the same batches.

The plot is DIR/coordinates.png and .svg; the numbers are in DIR/coordinates.json.
"""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from jax import Array
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import arguments, drawing
from experiments.jobs import Job
from experiments.results import Curve, finite
from rezero_jax import data
from rezero_jax.analysis import command
from rezero_jax.analysis.plots.theme import themed
from rezero_jax.analysis.probe import Tape, probed
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.errors import UserError
from rezero_jax.residual import rule_class
from rezero_jax.runs.files import write_json
from rezero_jax.training.state import State
from rezero_jax.training.step import Batch
from rezero_jax.training.trainer import Trainer

EXAMPLES_SEEN = 16
# Branches times depth^-alpha change activations by about depth^(1 - alpha) at first: slopes of 1,
# 1/2 and 0 for alpha 0, 1/2 and 1 (CompleteP). Half of the second tells a slope of 0 from it.
FLAT = 0.25
EXAMPLES = """\
examples:
  does pre_norm transfer over depth, and does completep?
    python -m experiments coordinates --config=configs/transformer_small.py:width=64,length=64 \\
      --config.optim.learning_rate=0.001 --rules=pre_norm,completep --depths=2,4,8,16,32,64
  over width:
    python -m experiments coordinates --config=configs/mlp.py:epochs=3 --rules=rezero,pre_norm \\
      --widths=32,64,128,256
"""


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """What was measured of a rule.

    Attributes:
      rule: its name.
      sizes: depths or widths.
      activation: mean |x| (seeds, sizes, updates + 1), before the first update and after each.
      change: mean |x - x_0| of the same shape.
    """

    rule: str
    sizes: list[int]
    activation: np.ndarray
    change: np.ndarray

    @property
    def slope(self) -> Estimate:
        """Of log change over log size after the last update, by least squares in each seed."""
        x = np.log(self.sizes)
        with np.errstate(all="ignore"):
            y = np.log(self.change[:, :, -1])
        centred = x - x.mean()
        return Estimate.of(y @ centred / (centred @ centred))

    @property
    def verdict(self) -> str:
        """What the 95 % interval of the slope says."""
        low, high = self.slope.interval()
        if not np.isfinite([low, high]).all():
            return "undecided"
        if low >= -FLAT and high <= FLAT:
            return "flat"
        if low > FLAT or high < -FLAT:
            return "grows" if low > FLAT else "shrinks"
        return "undecided"

    def to_json(self) -> dict[str, Any]:
        """All of it, with the slope and the verdict."""
        return {
            "activation": self.activation.tolist(),
            "change": self.change.tolist(),
            "slope": self.slope.mean,
            "interval": list(self.slope.interval()),
            "verdict": self.verdict,
        }


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status.

    Raises:
      UserError: a flag is wrong, or the config does not take these rules or sizes.
    """
    args, overrides = arguments.parse(_parser(), argv)
    axis = "depth" if args.depths else "width"
    sizes, rules = _sizes(axis, args.depths or args.widths), args.rules.split(",")
    arguments.check_positive(args, "steps", "seeds")
    arguments.check_config(args)
    found = []
    for rule in rules:
        of_sizes = {size: _config(args.config, overrides, rule, axis, size) for size in sizes}
        found.append(coordinates(rule, of_sizes, args.steps, args.seeds))
        interval = "{:+.2f} to {:+.2f}".format(*found[-1].slope.interval())
        print(f"{rule}: slope {found[-1].slope.mean:+.2f} ({interval}), {found[-1].verdict}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    shown = shlex.join(["python", "-m", "experiments", "coordinates", *argv])
    numbers = {coordinates.rule: coordinates.to_json() for coordinates in found}
    about = {"command": shown, "axis": axis, "sizes": sizes, "flat": FLAT}
    write_json(out / "coordinates.json", finite(about | {"rules": numbers}))
    drawing.save(themed(plot)(found, axis), out, "coordinates")
    print(f"plot: {out / 'coordinates.png'}")
    return 0


def coordinates(rule: str, configs: dict[int, ConfigDict], steps: int, seeds: int) -> Coordinates:
    """Measures a rule at each size, in its config, with seeds 0, 1, ..."""
    measured = []
    for size, config in configs.items():
        measured.append(measure(config, steps, seeds))
        x, change = measured[-1][:, :, -1].mean(axis=1)
        print(f"{rule}, {size}: |x| {x:.3g}, |x - x_0| {change:.3g}", flush=True)
    return Coordinates(rule, list(configs), *np.stack(measured, axis=2))


def measure(config: ConfigDict, steps: int, seeds: int) -> np.ndarray:
    """Mean |x| and mean |x - x_0| of the last layer, (2, seeds, steps + 1)."""
    config = config.copy_and_resolve_references()
    config.train.steps_per_dispatch = 1
    trainer = Trainer(config, data.load(config.data, config.seed), jax.devices()[:1])
    if trainer.intervals.total < steps:
        raise UserError(
            f"the config ends after {trainer.intervals.total} updates, and --steps={steps} are to "
            "be measured; raise its train.steps"
        )
    batch = trainer.examples(EXAMPLES_SEEN)
    leave = rule_class(config.model.residual).leave

    @jax.jit
    def last_layer(state: State, batch: Batch) -> Array:
        model = trainer.spec.model(state["params"], state["stats"])
        model.eval()
        tape = Tape()
        trainer.objective(probed(model, tape)[0], batch, jax.random.key(0))
        assert tape.left is not None
        return leave(tape.left)

    measured = []
    for seed in range(seeds):
        state = trainer.init(seed)
        seen = [last_layer(state, batch)]
        for fetched in islice(trainer.batches(0), steps):
            state, _ = trainer.dispatch(state, [fetched])
            seen.append(last_layer(state, batch))
        x = np.stack(seen).astype(np.float64).reshape(steps + 1, -1)
        measured.append([np.abs(x).mean(axis=1), np.abs(x - x[0]).mean(axis=1)])
    return np.stack(measured, axis=1)


def plot(found: Sequence[Coordinates], axis: str) -> Figure:
    """For each rule |x| and |x - x_0| by size, a line for each update."""
    seeds, _, lines = found[0].change.shape
    caption = (
        f"Lines: updates 0 to {lines - 1}, from dark to light; means of {seeds} seeds. "
        + "; ".join(f"{one.rule}: slope {one.slope.mean:+.2f}, {one.verdict}" for one in found)
    )
    figure, axes = drawing.captioned(
        f"The last layer's activations by {axis}", caption, 2 * len(found), 3.0
    )
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, lines))
    for quantity, panels in (("activation", axes[::2]), ("change", axes[1::2])):
        means = {
            one.rule: getattr(one, quantity).mean(0)[:, quantity == "change" :] for one in found
        }
        everything = np.concatenate([*means.values()])
        shown = everything[np.isfinite(everything) & (everything > 0)]
        for panel, (rule, of_rule) in zip(panels, means.items(), strict=True):
            for update, mean in enumerate(of_rule.T, quantity == "change"):
                label = str(update) if update in (1, lines - 1) else None
                curve = Curve(list(map(float, found[0].sizes)), mean.tolist())
                drawing.line(panel, curve, label, to_hex(colours[update]))
            panel.set(xscale="log", yscale="log", title=rule, xlabel=axis)
            panel.set_ylabel("mean |x|" if quantity == "activation" else "mean |x - x$_0$|")
            panel.set_ylim(0.8 * shown.min(initial=1), 1.25 * shown.max(initial=1))
            panel.set_xticks(found[0].sizes, map(str, found[0].sizes))
            panel.minorticks_off()
    axes[0].legend(title="update")
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("experiments coordinates", __doc__, EXAMPLES)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:KEY=VALUE,...]",
        help="a file of configs/ that takes residual= and depth= or width=",
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help="sets a field of the config")
    parser.add_argument("--rules", required=True, metavar="RULE,...")
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--depths", metavar="N,...")
    sizes.add_argument("--widths", metavar="N,...")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="updates (10)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument(
        "--out", default="runs/coordinates", metavar="DIR", help="(runs/coordinates)"
    )
    return parser


def _sizes(axis: str, text: str) -> list[int]:
    sizes = text.split(",")
    if len(set(sizes)) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise UserError(f"--{axis}s={text} are not two whole numbers above 0 or more; give 2,8,32")
    return sorted({int(size) for size in sizes})


def _config(config: str, overrides: Sequence[str], rule: str, axis: str, size: int) -> ConfigDict:
    named = arguments.with_arguments(config, f"residual={rule}", f"{axis}={size}")
    loaded = Job("", "", named, tuple(overrides)).load()
    if loaded.model[axis] != size:
        raise UserError(
            f"--config={config} sets the {axis} to {loaded.model[axis]} whatever --{axis}s says; "
            "leave out what does"
        )
    return loaded
