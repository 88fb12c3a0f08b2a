"""The coordinate check: how much activations change with depth or width while training begins.

A coordinate is a number of what the last layer returns, before a final norm. For every rule and
size the command measures the mean |x| over the coordinates of 16 examples of the evaluation split,
before the first update and after each of the first, and the mean |x - x_0| from the value before
them. Where hyperparameters transfer, these change by as much at every size: the slope of log
|x - x_0| over log size is 0. (arXiv 2505.01618, figure 7, shows |x| by depth for tiny Shakespeare.)
Seeds differ in the initial weights, and see the same batches.

Nor should layers come to be linear in their parameters as a net grows. How nonlinear one is, is
|x - x_0 - J d| / |J d|, where the last layer is as after the last update and all else as before the
first, and J d is what the change d of its parameters makes of x to first order. (Figure 6 there has
such a distance for a toy net.)

The plot is DIR/coordinates.png and .svg; the numbers are in DIR/coordinates.json.
"""

import argparse
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import arguments, drawing
from experiments.jobs import Job
from experiments.results import Curve, finite
from experiments.slopes import FLAT, Coordinates
from rezero_jax import command, data
from rezero_jax.analysis.plots.theme import themed
from rezero_jax.analysis.probe import Tape, probed
from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.residual import rule_class
from rezero_jax.runs.files import write_json
from rezero_jax.training.state import ModelSpec, State
from rezero_jax.training.step import Batch
from rezero_jax.training.trainer import Trainer

EXAMPLES_SEEN = 16
EXAMPLES = """\
examples:
  does pre_norm transfer over depth, and does completep?
    python -m experiments coordinates --config=configs/transformer_small.py:width=64,length=64 \\
      --config.optim.learning_rate=0.001 --rules=pre_norm,completep --depths=2,4,8,16,32,64
  over width:
    python -m experiments coordinates --config=configs/mlp.py:epochs=3 --rules=rezero,pre_norm \\
      --widths=32,64,128,256
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status.

    Raises:
      UserError: a flag is wrong, or the config does not take these rules or sizes.
    """
    args, overrides = arguments.parse(_parser(), argv)
    axis = "depth" if args.depths else "width"
    sizes = _sizes(axis, args.depths or args.widths)
    arguments.check_positive(args, "steps", "seeds")
    arguments.check_config(args)
    found = []
    for rule in args.rules:
        of_sizes = {size: _config(args.config, overrides, rule, axis, size) for size in sizes}
        found.append(coordinates(rule, of_sizes, args.steps, args.seeds))
        for quantity, slope in found[-1].slopes.items():
            print(f"{rule}: slope of the {quantity} {slope}")
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
    measured, distances = [], []
    for size, config in configs.items():
        of_x, distance = measure(config, steps, seeds)
        x, change = of_x[:, :, -1].mean(axis=1)
        print(
            f"{rule}, {size}: |x| {x:.3g}, |x - x_0| {change:.3g}, "
            f"nonlinearity {distance.mean():.3g}",
            flush=True,
        )
        measured.append(of_x)
        distances.append(distance)
    activation, change = np.stack(measured, axis=2)
    return Coordinates(rule, list(configs), activation, change, np.stack(distances, axis=1))


def measure(config: ConfigDict, steps: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """What training changes.

    Returns:
      Mean |x| and mean |x - x_0| of the last layer, (2, seeds, steps + 1); and how nonlinear it is
      in the change of its parameters, (seeds,).
    """
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

    @jax.jit
    def nonlinearity(before: State, after: State, batch: Batch) -> Array:
        moved = _with_layer(trainer.spec, config.model.depth - 1, before["params"], after["params"])
        change = jax.tree.map(jnp.subtract, moved, before["params"])

        def x(params: Any) -> Array:
            return last_layer({**before, "params": params}, batch).astype(jnp.float32)

        # Probes have derivatives backwards alone: J d is the transpose of c -> c J.
        x_0, backwards = jax.vjp(x, before["params"])
        (linear,) = jax.linear_transpose(lambda c: backwards(c)[0], x_0)(change)
        return jnp.linalg.norm(x(moved) - x_0 - linear) / jnp.linalg.norm(linear)

    measured, distances = [], []
    for seed in range(seeds):
        state = trainer.init(seed)
        seen = [last_layer(state, batch)]
        for fetched in islice(trainer.batches(0), steps):
            state, _ = trainer.dispatch(state, [fetched])
            seen.append(last_layer(state, batch))
        x = np.stack(seen).astype(np.float64).reshape(steps + 1, -1)
        measured.append([np.abs(x).mean(axis=1), np.abs(x - x[0]).mean(axis=1)])
        distances.append(float(nonlinearity(trainer.init(seed), state, batch)))
    return np.stack(measured, axis=1), np.array(distances)


def _with_layer(spec: ModelSpec, layer: int, before: Any, after: Any) -> Any:
    """The parameters `before`, but those of a layer (0, 1, ...) as they are `after`."""

    def leaf(path: Any, before: Array, after: Array) -> Array:
        text = path_text(path)
        if spec.parameters[text].is_stacked:
            return before.at[layer].set(after[layer])
        return after if f"blocks/{layer}/" in text else before

    return jax.tree.map_with_path(leaf, before, after)


def plot(found: Sequence[Coordinates], axis: str) -> Figure:
    """For each rule |x| and |x - x_0| by size, a line for each update; the nonlinearity of all."""
    seeds, _, lines = found[0].change.shape
    caption = (
        f"Lines: updates 0 to {lines - 1}, from dark to light; means of {seeds} seeds. "
        + "; ".join(
            f"{one.rule}: slope of the {quantity} {slope}"
            for one in found
            for quantity, slope in one.slopes.items()
        )
    )
    figure, axes = drawing.captioned(
        f"The last layer's activations by {axis}", caption, 2 * len(found) + 1, 3.0
    )
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, lines))
    for quantity, panels in (("activation", axes[:-1:2]), ("change", axes[1:-1:2])):
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
            panel.set(yscale="log", title=rule)
            panel.set_ylabel("mean |x|" if quantity == "activation" else "mean |x - x$_0$|")
            panel.set_ylim(0.8 * shown.min(initial=1), 1.25 * shown.max(initial=1))
    axes[0].legend(title="update")
    of_rules = drawing.colours(one.rule for one in found)
    for one in found:
        curve = Curve(list(map(float, one.sizes)), one.nonlinearity.mean(0).tolist())
        drawing.line(axes[-1], curve, one.rule, of_rules[one.rule])
    axes[-1].set(yscale="log", title="last layer", ylabel="|x - x$_0$ - J d| / |J d|")
    axes[-1].legend()
    for panel in axes:
        panel.set(xscale="log", xlabel=axis)
        panel.set_xticks(found[0].sizes, map(str, found[0].sizes))
        panel.minorticks_off()
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("python -m experiments coordinates", __doc__, EXAMPLES)
    arguments.add_rules(parser, "depth= or width=")
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
