"""Figure 4 and the authors' notebook: singular values of the input-output Jacobian."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing, resnet, spectra, transformer_deep
from experiments.claims import Claim, bounded, quoted
from experiments.jobs import Job
from experiments.results import Curve, Results, Row, find
from experiments.spectra import BIN, logs, mode
from experiments.statistics import mapped, paired
from rezero_jax.runs.reader import Run

VANISHED = 1e-10
SQUARES = "mean squared singular value"
HEADLINES = (
    ("ResNet-110, epoch 0", "largest log10"),
    ("ResNet-110, epoch 0", "mean of log10"),
    ("ResNet-110 + ReZero, epoch 0", "mean of log10"),
)
NETS = {"ResNet-110": "residual", "ResNet-110 + ReZero": "rezero"}
DEEP = "ReZero, 64 layers"
# The seeds of the ResNets at initialisation; seed 0, that of the run, was known before E4 D.
UNTRAINED = {"paper": range(1, 11), "cpu": range(1, 11), "smoke": range(1, 3)}
# By scale and network, the paper's epochs and the updates after which we measure.
STAGES = {
    "paper": ({0: 0, 1: 391, 4: 1563}, {0: 0, 1: 1192, 4: 4768}),
    "cpu": ({0: 0, 1: 100}, {0: 0, 1: 200}),
    "smoke": ({0: 0, 1: 12}, {0: 0, 1: 20}),
}


def runs(scale: str) -> list[Job]:
    """Both ResNets and the Transformer, shared with other experiments where possible."""
    if scale == "smoke":
        return [
            *(
                job._replace(setting=name)
                for name, job in zip(NETS, resnet.runs(scale), strict=True)
            ),
            transformer_deep.job(transformer_deep.OURS, scale)._replace(setting=DEEP),
        ]
    jobs = []
    for setting, rule in NETS.items():
        # Of both recipes the notebook's shortcuts and initial weights have Figure 4's spectra.
        config = f"resnet.py:recipe=notebook,depth=110,residual={rule},epochs=4"
        keep: tuple[str, ...] = ("checkpoint.every_steps=391", "checkpoint.keep=5")
        if scale == "cpu":
            keep = ("train.epochs=None", "train.steps=100")
            keep += ("eval.every_epochs=None", "eval.examples=1000")
        jobs.append(Job(setting, f"jacobian-resnet110-{rule}", config, keep))
    if scale == "cpu":
        deep = transformer_deep.job(transformer_deep.OURS, scale)._replace(setting=DEEP)
    else:
        config = "transformer_notebook.py:layers=64,steps=4768,epochs=4"
        keep = ("checkpoint.every_steps=1192", "checkpoint.keep=4", "eval.examples=500")
        deep = Job(DEEP, "jacobian-transformer64", config, keep)
    return [*jobs, deep]


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The spectra at initialisation and in training."""
    smoke = scale == "smoke"
    rows, curves = [], {}

    def add(setting: str, found: Sequence[np.ndarray], reduced: bool, at_start: bool) -> None:
        rows.extend(_rows(setting, found, reduced or smoke, at_start))
        curves[setting] = Curve(*(values.tolist() for values in spectra.histogram(found)))

    for setting, found in spectra.at_initialisation(scale).items():
        add(setting, found, reduced=False, at_start=True)
    for setting, seeds in runs.items():
        for epoch, step in STAGES[scale][setting == DEEP].items():
            if step == 0 and setting in NETS:
                found = spectra.untrained(seeds[0], UNTRAINED[scale])
            else:
                found = [spectra.after(run, step) for run in seeds]
            trained_less = step > 0 and (scale != "paper" or setting == DEEP)
            named = scale == "paper" or not step
            label = f"{setting}, epoch {epoch}" if named else f"{setting}, after {step} updates"
            add(label, found, trained_less, at_start=False)
    return Results("jacobian", scale, rows, _claims(scale, rows), curves)


def _rows(setting: str, found: Sequence[np.ndarray], reduced: bool, at_start: bool) -> list[Row]:
    """The numbers of the paper or the notebook for a spectrum, one for each network.

    At initialisation the histogram is of all networks together, and only the mean square counts as
    the same experiment: the paper does not describe the networks of Figure 4a.
    """
    pooled = [np.concatenate(found)] if at_start else found
    measures = {
        SQUARES: lambda values: (values**2).mean(),
        "mean of log10": lambda values: logs(values).mean(),
        "median of log10": lambda values: np.median(logs(values)),
        "deviation of log10": lambda values: logs(values).std(),
        "mode of log10": lambda values: mode(logs(values)),
        "largest log10": lambda values: logs(values).max(),
        "share below 1e-10": lambda values: (values < VANISHED).mean(),
    }
    return [
        Row(
            setting,
            metric,
            tuple(float(of(values)) for values in (found if metric == SQUARES else pooled)),
            (setting, metric) in HEADLINES,
            reduced or (at_start and metric != SQUARES),
        )
        for metric, of in measures.items()
        if not (at_start and metric == "largest log10")
    ]


def _claims(scale: str, rows: Sequence[Row]) -> list[Claim]:
    row = partial(find, rows)
    deep, late = f"{DEEP}, epoch 0", [r.setting for r in rows if r.setting.startswith(DEEP)][-1]
    squares, deviations = row(deep, SQUARES).draws, row(deep, "deviation of log10").draws
    claims = [
        Claim(
            "At initialisation all singular values of the ReZero Transformer are 1",
            "UAI 5",
            set(squares) == {1.0} and set(deviations) == {0.0},
            f"mean square {quoted(squares)}, deviation of log10 {quoted(deviations)}; exact",
            len(squares),
            reduced=scale == "smoke",
        ),
        bounded(
            "In training the singular values of the ReZero Transformer stay near 1",
            "UAI 5",
            "mean of log10, within 1 of 0",
            row(late, "mean of log10").draws,
            low=-1,
            high=1,
            reduced=row(late, "mean of log10").reduced,
        ),
    ]
    if scale == "smoke":
        return claims
    (vanished,) = row("post-norm, 64 layers", "share below 1e-10").draws
    modes = [row(f"post-norm, {n} layers", "mode of log10").draws[0] for n in (4, 12, 64)]
    nets = [f"{setting}, epoch 0" for setting in NETS]
    before, after = (mapped(abs, row(net, "mean of log10").draws) for net in nets)
    return [
        *claims,
        Claim(
            "At initialisation the singular values of the post-norm Transformer vanish with depth, "
            "at 64 layers to machine precision",
            "UAI 5",
            None,
            f"{vanished or 0:.0%} are below 1e-10; the modes of log10 at 4, 12 and 64 layers are "
            f"{quoted(modes)}, in networks of the notebook's size; Figure 4a's size is unknown",
            n=10,
            reduced=True,
        ),
        bounded(
            "The vanilla ResNet-110 multiplies signals by up to 10^8 at initialisation",
            "UAI 5",
            "the largest log10, 7 to 9",
            row(nets[0], "largest log10").draws,
            low=7,
            high=9,
        ),
        bounded(
            "ReZero improves signal propagation in ResNet-110 by about 10^6",
            "UAI 5",
            "how much nearer to 0 the mean of log10 is, 5 to 7",
            paired(before, after),
            low=5,
            high=7,
        ),
    ]


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
            shares = np.array(results.curves[name].y)
            edges = np.append(results.curves[name].x, results.curves[name].x[-1] + BIN) - BIN / 2
            label = name if start == "post-norm, " else name.removeprefix(start)
            axis.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
            axis.stairs(shares, edges, color=colour, label=label)
        axis.set(title=title, xlabel="log10 of the singular values", ylabel="share")
        axis.legend(fontsize=8)
    return figure
