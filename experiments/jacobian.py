"""Figure 4 and the authors' notebook: singular values of the input-output Jacobian."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing, spectra
from experiments.published import quoted
from experiments.results import Curve, Results, Runs
from experiments.spectra import BIN, SQUARES, logs, mode

VANISHED = 1e-10
VANILLA, DEEP = "ResNet-110", "ReZero, 64 layers"
FRESH, FRESH_REZERO = f"{VANILLA}, epoch 0", f"{VANILLA} + ReZero, epoch 0"
MEAN, LARGEST = "mean of log10", "largest log10"
# The seeds of the ResNets at initialisation; seed 0, that of the run, was known before E4 D.
UNTRAINED = {"paper": range(1, 11), "cpu": range(1, 11), "smoke": range(1, 3)}
# By scale, the paper's epochs and the updates after which we measure ResNets and the Transformer.
STAGES = {
    "paper": ({0: 0, 1: 391, 4: 1563}, {0: 0, 1: 1192, 4: 4768}),
    "cpu": ({0: 0, 1: 100}, {0: 0, 1: 200}),
    "smoke": ({0: 0, 1: 12}, {0: 0, 1: 20}),
}
MEASURES = {
    SQUARES: lambda values: (values**2).mean(),
    MEAN: lambda values: logs(values).mean(),
    "median of log10": lambda values: np.median(logs(values)),
    "deviation of log10": lambda values: logs(values).std(),
    "mode of log10": lambda values: mode(logs(values)),
    LARGEST: lambda values: logs(values).max(),
    "share below 1e-10": lambda values: (values < VANISHED).mean(),
}


def measure(results: Results, runs: Runs) -> None:
    """The spectra at initialisation and in training."""
    scale = results.scale
    for setting, found in spectra.at_initialisation(scale).items():
        _add(results, setting, found, reduced=False, fresh=True)
    for setting, seeds in runs.items():
        for epoch, step in STAGES[scale][setting == DEEP].items():
            if step == 0 and setting != DEEP:
                found = spectra.untrained(seeds[0], UNTRAINED[scale])
            else:
                found = [spectra.after(run, step) for run in seeds]
            named = scale == "paper" or not step
            label = f"{setting}, epoch {epoch}" if named else f"{setting}, after {step} updates"
            trained_less = step > 0 and (scale != "paper" or setting == DEEP)
            _add(results, label, found, reduced=trained_less)
    _judge(results)


def _add(
    results: Results, setting: str, found: Sequence[np.ndarray], reduced: bool, fresh: bool = False
) -> None:
    """Adds the numbers of each spectrum, and the histogram of all.

    Fresh Transformers have only their mean square in common with the paper, which does not describe
    those of Figure 4a; their other numbers are of all networks together.
    """
    results.curves[setting] = Curve(*spectra.histogram(found))
    for metric, of in MEASURES.items():
        pooled = fresh and metric != SQUARES
        if not (fresh and metric == LARGEST):
            values = [np.concatenate(found)] if pooled else found
            fields = {"reduced": reduced or pooled or results.reduced}
            results.add(setting, metric, (float(of(one)) for one in values), **fields)


def _judge(results: Results) -> None:
    deep = f"{DEEP}, epoch 0"
    late = [row for row in results.rows if row.setting.startswith(DEEP)][-1].setting
    squares, deviations = (results.row(deep, m).draws for m in (SQUARES, "deviation of log10"))
    text = "At initialisation all singular values of the ReZero Transformer are 1"
    found = set(squares) == {1.0} and set(deviations) == {0.0}
    evidence = f"mean square {quoted(squares)}, deviation of log10 {quoted(deviations)}; exact"
    results.claim(text, "UAI 5", found, evidence, len(squares))
    means = results.row(late, MEAN)
    text = "In training the singular values of the ReZero Transformer stay near 1"
    quantity = f"{MEAN}, within 1 of 0"
    results.bounded(text, "UAI 5", quantity, means.draws, -1, 1, reduced=means.reduced)
    if results.scale == "smoke":
        return
    (vanished,) = results.row("post-norm, 64 layers", "share below 1e-10").draws
    modes = [results.row(f"post-norm, {n} layers", "mode of log10").draws[0] for n in (4, 12, 64)]
    text = "At initialisation the singular values of the post-norm Transformer vanish with depth, "
    text += "at 64 layers to machine precision"
    evidence = (
        f"{vanished or 0:.0%} are below 1e-10; the modes of log10 at 4, 12 and 64 layers are "
    )
    evidence += f"{quoted(modes)}, in networks of the notebook's size; Figure 4a's size is unknown"
    results.claim(text, "UAI 5", None, evidence, 10, reduced=True)


def plot(results: Results) -> Figure:
    """The panels of Figure 4."""
    figure, axes = drawing.sheet_of(results, 4, height=3.2)
    net = "ResNet-8" if results.scale == "smoke" else "ResNet-110"
    panels = {
        "Transformers at initialisation": "post-norm, ",
        "ReZero Transformer in training": f"{DEEP}, ",
        f"{net}, vanilla": "ResNet-110, ",
        f"{net}, ReZero": "ResNet-110 + ReZero, ",
    }
    for axis, (title, start) in zip(axes, panels.items(), strict=True):
        names = [name for name in results.curves if name.startswith(start)]
        if start == "post-norm, ":
            names.sort(key=lambda name: int(name.split()[1]))
        for name, colour in drawing.colours(names).items():
            label = name if start == "post-norm, " else name.removeprefix(start)
            drawing.histogram(axis, results.curves[name], BIN, label, colour)
        axis.set(title=title, xlabel="log10 of the singular values", ylabel="share")
        drawing.legend(axis)
    return figure
