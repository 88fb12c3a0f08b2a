"""The coordinate check: how the first updates change activations, by depth or width.

For 16 examples, the check measures the mean |x| of the last layer after each update, and its mean
change |x - x_0| since initialisation. If hyperparameters transfer, the slope of the change over the
size is 0. Also, the last layer should not become linear in its parameters: its nonlinearity is
|x - x_0 - J d| / |J d|, where J d is the first-order effect on x of the change d of its parameters,
with all other parameters as initialised. Seeds differ in the initial weights alone.
docs/experiments.md explains both measures.

The plot is DIR/coordinates.png and .svg; the numbers are in DIR/coordinates.json.
"""

import shlex
from collections.abc import Mapping, Sequence
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
from experiments.results import Curve, Made, Results
from experiments.statistics import NOT_SIGNIFICANT, verdict
from rezero_jax import command, data
from rezero_jax.analysis.propagation import trunk_ends
from rezero_jax.analysis.theme import plain_ticks, themed
from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.residual import RULES
from rezero_jax.runs.folder import device, environment
from rezero_jax.training.state import ModelSpec, State
from rezero_jax.training.step import Batch
from rezero_jax.training.trainer import Trainer

EXAMPLES_SEEN = 16
ACTIVATION, CHANGE, NONLINEARITY = "mean |x|", "mean |x - x_0|", "nonlinearity"  # metrics
# Slopes nearer to 0 are flat: half of the smallest slope that another theory predicts. Under a rate
# that does not fall with depth, branches times depth^-1/2 give changes a slope of 1/2, and under
# depth_mup an activation with a kink gives the nonlinearity one of -1/4.
FLAT = {CHANGE: 1 / 4, NONLINEARITY: 1 / 8}
# What to do, by the verdict on a slope.
ADVICE = {
    CHANGE: {
        "within": "changes are alike, so a learning rate tuned at a small size should transfer",
        "higher": "changes grow with the size, so tune the learning rate again at larger sizes; "
        "expect a smaller one, or use a rule that scales with the size, such as completep",
        "lower": "changes shrink with the size, so tune the learning rate again at larger sizes; "
        "expect a larger one",
        NOT_SIGNIFICANT: "whether a learning rate transfers is open; use more seeds or a wider "
        "range of sizes",
    },
    NONLINEARITY: {
        "lower": "larger networks learn almost linearly, so features may not be learned",
    },
}
EXAMPLES = """\
does pre_norm transfer over depth, and does completep?
  python -m experiments coordinates --config=configs/transformer_small.py:width=64,length=64 \\
    --config.optim.learning_rate=0.001 --rules=pre_norm,completep --depths=2,4,8,16,32,64
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status; raises UserError for a wrong flag."""
    parser = command.parser("python -m experiments coordinates", __doc__, EXAMPLES)
    arguments.add_rules(parser, "depth= or width=", "residual rules")
    group = parser.add_mutually_exclusive_group(required=True)
    for axis, text in (("depth", "numbers of layers"), ("width", "widths, instead of --depths")):
        group.add_argument(f"--{axis}s", type=arguments.sizes, metavar="N,...", help=text)
    arguments.add_count(parser, "steps", "updates", 10)
    arguments.add_count(parser, "seeds", "seeds of the initial weights", 3)
    text = "output folder (default: runs/coordinates)"
    parser.add_argument("--out", default="runs/coordinates", metavar="DIR", help=text)
    args, overrides = arguments.parse(parser, argv)
    axis = "depth" if args.depths else "width"
    if len(args.depths or args.widths) < 2:
        raise UserError(f"a slope needs two sizes; give --{axis}s=2,8,32")
    results = Results("coordinates", "")
    for rule in args.rules:
        sizes = args.depths or args.widths
        configs = {size: _config(args.config, overrides, rule, axis, size) for size in sizes}
        add_rows(results, rule, configs, args.steps, args.seeds)
    out = Path(args.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    shown = shlex.join(["python", "-m", "experiments", "coordinates", *argv])
    results.made = Made(shown, device(environment()), 0.0, [])
    results.write(out)
    drawing.save(themed(plot)(results, axis), out, "coordinates")
    print(f"plot: {out / 'coordinates.png'}")
    return 0


def add_rows(
    results: Results, rule: str, configs: Mapping[int, ConfigDict], steps: int, seeds: int
) -> None:
    """Measures a rule at each size, in its config, with seeds 0, 1, ..., and judges the slopes."""
    ends: dict[str, list[np.ndarray]] = {CHANGE: [], NONLINEARITY: []}  # (sizes)(seeds)
    for size, config in configs.items():
        (activation, change), nonlinearity = measure(config, steps, seeds)
        for name, values in ((ACTIVATION, activation), (CHANGE, change)):
            for update, draws in enumerate(values.T.tolist()):
                results.add(rule, f"{name} after update {update}", draws, size=size)
        results.add(rule, NONLINEARITY, nonlinearity.tolist(), size=size)
        ends[CHANGE].append(change[:, -1])
        ends[NONLINEARITY].append(nonlinearity)
        changed, bent = change[:, -1].mean(), nonlinearity.mean()
        print(f"{rule}, {size}: |x - x_0| {changed:.3g}, nonlinearity {bent:.3g}", flush=True)
    for metric_name, values in ends.items():
        slopes, flat = slopes_of(list(configs), np.stack(values, axis=1)), FLAT[metric_name]
        metric = f"slope of the log {metric_name} over the log size"
        results.add(rule, metric, slopes.tolist())
        row = results.rows[-1]
        low, high = row.interval() or (np.nan, np.nan)
        word = verdict((low, high), -flat, flat)
        words = {"within": "within", NOT_SIGNIFICANT: "perhaps within"}
        where = words.get(word, f"{word} than")
        results.remarks.append(
            f"{rule}: {metric} {np.nan if row.mean is None else row.mean:+.2f} "
            f"({low:+.2f} to {high:+.2f}), {where} ±{flat:g}"
        )
        print(results.remarks[-1])
        if word in ADVICE[metric_name]:
            print(f"{rule}: {ADVICE[metric_name][word]}")


def slopes_of(sizes: Sequence[int], values: np.ndarray) -> np.ndarray:
    """The least-squares slope of log value over log size in each seed; values (seeds, sizes)."""
    x = np.log(sizes)
    with np.errstate(all="ignore"):
        y = np.log(values)
    centred = x - x.mean()
    return y @ centred / (centred @ centred)


def measure(config: ConfigDict, steps: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean |x| and |x - x_0| of the last layer (2, seeds, steps + 1), nonlinearity (seeds,)."""
    config = config.copy_and_resolve_references()
    config.train.steps_per_dispatch = 1
    trainer = Trainer(config, data.load(config.data, config.seed), jax.devices()[:1])
    if trainer.intervals.total < steps:
        raise UserError(
            f"the config ends after {trainer.intervals.total} updates, before --steps={steps}; "
            "raise its train.steps"
        )
    batch = trainer.examples(EXAMPLES_SEEN)
    leave = RULES[config.model.residual].leave

    @jax.jit
    def last_layer(state: State, batch: Batch) -> Array:
        model = trainer.spec.model(state["params"], state["stats"])
        model.eval()
        ends = trunk_ends(model, batch, trainer.losses)
        return leave(ends[1])

    @jax.jit
    def nonlinearity(before: State, after: State, batch: Batch) -> Array:
        moved = _with_layer(trainer.spec, config.model.depth - 1, before["params"], after["params"])
        change = jax.tree.map(jnp.subtract, moved, before["params"])

        def x(params: Any) -> Array:
            return last_layer({**before, "params": params}, batch).astype(jnp.float32)

        # Probes have no forward-mode derivative, so J d is the transpose of c -> c J.
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
    """The parameters `before`, with those of one layer (0, 1, ...) replaced by `after`."""

    def leaf(path: Any, before: Array, after: Array) -> Array:
        text = path_text(path)
        if spec.parameters[text].is_stacked:
            return before.at[layer].set(after[layer])
        return after if f"blocks/{layer}/" in text else before

    return jax.tree.map_with_path(leaf, before, after)


def plot(results: Results, axis: str) -> Figure:
    """For each rule |x| and |x - x_0| by size, a line for each update; the nonlinearity of all."""
    means: dict[str, dict[str, dict[int, float]]] = {}  # by metric, rule and size
    for row in results.rows:
        if row.size:
            mean = np.nan if row.mean is None else row.mean
            means.setdefault(row.metric, {}).setdefault(row.setting, {})[row.size] = mean
    rules, seeds = list(means[NONLINEARITY]), len(results.rows[0].draws)
    sizes = list(means[NONLINEARITY][rules[0]])
    updates = sum(metric.startswith(CHANGE) for metric in means)
    caption = f"Lines: updates 0 to {updates - 1}, from dark to light; means of {seeds} seeds. "
    title, caption = f"The last layer's activations by {axis}", caption + "; ".join(results.remarks)
    figure, axes = drawing.sheet(title, caption, 2 * len(rules) + 1, 3.0)
    colours = [to_hex(c) for c in matplotlib.colormaps["viridis"](np.linspace(0, 0.9, updates))]
    for first, (name, label) in enumerate(((ACTIVATION, "mean |x|"), (CHANGE, "mean |x - x$_0$|"))):
        drawn = [means[f"{name} after update {u}"] for u in range(first, updates)]
        values = np.array([list(one[rule].values()) for one in drawn for rule in rules])
        shown = values[np.isfinite(values) & (values > 0)]
        for panel, rule in zip(axes[first:-1:2], rules, strict=True):
            for update, one in enumerate(drawn, first):
                drawing.line(panel, _by_size(one[rule]), None, colours[update])
            panel.set(yscale="log", title=rule, ylabel=label)
            if shown.size:
                panel.set_ylim(0.8 * shown.min(), 1.25 * shown.max())
    for rule, colour in drawing.colours(rules).items():
        drawing.line(axes[-1], _by_size(means[NONLINEARITY][rule]), rule, colour)
    axes[-1].set(yscale="log", title="last layer", ylabel="|x - x$_0$ - J d| / |J d|")
    drawing.legend(axes[-1])
    for panel in axes:
        drawing.size_axis(panel, sizes, axis)
        plain_ticks(panel)
    return figure


def _by_size(values: Mapping[int, float]) -> Curve:
    return Curve([float(size) for size in values], list(values.values()))


def _config(config: str, overrides: Sequence[str], rule: str, axis: str, size: int) -> ConfigDict:
    named = arguments.with_arguments(config, f"residual={rule}", f"{axis}={size}")
    loaded = Job("", "", named, tuple(overrides)).load()
    arguments.check_size(config, loaded.model, axis, size)
    return loaded
