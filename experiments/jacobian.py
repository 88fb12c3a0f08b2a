"""Figure 4 and the authors' notebook: singular values of the input-output Jacobian."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing, resnet, spectra, transformer_deep
from experiments.claims import Claim, bounded, fact
from experiments.jobs import Job
from experiments.results import Curve, Results, Row, find, quoted
from experiments.spectra import BIN, FLOOR, logs, mode
from rezero_jax.runs.reader import Run

TITLE = "Singular values of the input-output Jacobian"
SOURCE = "UAI Figure 4, the authors' Transformer notebook"
SEEDS = 1
_START = (
    "At initialisation as in the notebook: width 16, 4 heads, feed-forward 64, 4 positions, 10 "
    "networks with a normal input each, ReZero with alpha 0.1. "
)
SETTING = {
    "paper": _START + "In training: ResNet-110 after 0, 1 and 4 epochs; a ReZero Transformer of 64 "
    "layers (reduced: bytes instead of WikiText-2's words) after 0, 1,192 and 4,768 updates.",
    "cpu": _START
    + "In training, reduced: ResNet-110 after 0 and 100 updates, a ReZero Transformer "
    "of 64 layers after 0 and 200.",
    "smoke": "Reduced: as at the other scales, but of 2 layers, 2 networks each, and the networks "
    "of the other smoke tests in training.",
}

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
NOTES = (
    "The paper gives no sizes, inputs or sample counts for Figure 4; here the sizes are those "
    "of the authors' notebooks and all inputs are normal: for ResNets 30 images in evaluation "
    "mode, with BatchNorm's statistics still 0 and 1 at initialisation, where there are ten nets "
    "of each (part E4 D of experiments/protocol.md). Computed in float32, "
    "as theirs: a value below 1e-7 of the largest of its network is rounding, and one below "
    f"{FLOOR:.0e} counts as that: so do the zeros of a network that does not tell its inputs "
    "apart. Bins are "
    f"{BIN} wide. The mean squared singular value of networks with a heavy tail swings from "
    "one draw of them to the next, as its standard error tells.",
)


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
    rows, curves = [], {}
    for setting, found in spectra.at_initialisation(scale).items():
        rows += _rows(setting, found, scale == "smoke", at_start=True)
        curves[setting] = _histogram(found)
    for setting, seeds in runs.items():
        stages = STAGES[scale][setting == DEEP]
        for epoch, step in stages.items():
            if step == 0 and setting in NETS:
                found = spectra.untrained(seeds[0], UNTRAINED[scale])
            else:
                found = [spectra.after(run, step) for run in seeds]
            trained_less = step > 0 and (scale != "paper" or setting == DEEP)
            name = f"{setting}, epoch {epoch}"
            label = name if scale == "paper" or not step else f"{setting}, after {step} updates"
            rows += _rows(label, found, trained_less or scale == "smoke")
            curves[label] = _histogram(found)
    return Results("jacobian", scale, rows, _claims(scale, rows, runs), curves)


def _rows(
    setting: str,
    found: Sequence[np.ndarray],
    reduced: bool,
    at_start: bool = False,
) -> list[Row]:
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
            quantity,
            tuple(float(of(values)) for values in (found if quantity == SQUARES else pooled)),
            (setting, quantity) in HEADLINES,
            reduced or (at_start and quantity != SQUARES),
        )
        for quantity, of in measures.items()
        if not (at_start and quantity == "largest log10")
    ]


def _histogram(found: Sequence[np.ndarray]) -> Curve:
    """The share of the values in each bin of log10, of all networks together."""
    log10 = np.concatenate([logs(values) for values in found])
    edges = BIN * np.arange(np.round(log10.min() / BIN) - 1, np.round(log10.max() / BIN) + 3)
    shares = np.histogram(log10, edges - BIN / 2)[0] / len(log10)
    return Curve(edges[:-1].tolist(), shares.tolist())


def _claims(scale: str, rows: Sequence[Row], runs: Mapping[str, Sequence[Run]]) -> list[Claim]:
    def row(setting: str, quantity: str) -> Row:
        return find(rows, setting, quantity)

    deep, late = f"{DEEP}, epoch 0", [r.setting for r in rows if r.setting.startswith(DEEP)][-1]
    vanilla, rezero = (f"{setting}, epoch 0" for setting in NETS)
    squares, deviations = row(deep, SQUARES).ours, row(deep, "deviation of log10").ours
    claims = [
        fact(
            "At initialisation all singular values of the ReZero Transformer are 1",
            "UAI 5",
            set(squares) == {1.0} and set(deviations) == {0.0},
            f"mean square {quoted(squares)}, deviation of log10 {quoted(deviations)}; exact",
            n=len(squares),
            reduced=scale == "smoke",
        ),
        bounded(
            "In training those of the ReZero Transformer stay near 1",
            "UAI 5",
            "mean of log10, within 1 of 0",
            row(late, "mean of log10").ours,
            low=-1,
            high=1,
            reduced=row(late, "mean of log10").reduced,
        ),
    ]
    if scale == "smoke":
        return claims
    (vanished,) = row("post-norm, 64 layers", "share below 1e-10").ours
    modes = [row(f"post-norm, {n} layers", "mode of log10").ours[0] for n in (4, 12, 64)]
    before, after = (row(net, "mean of log10").ours for net in (vanilla, rezero))
    return [
        *claims,
        fact(
            "At initialisation those of the post-norm Transformer vanish with depth, at 64 layers "
            "to machine precision",
            "UAI 5",
            None,
            f"{vanished or 0:.0%} are below 1e-10; the modes of log10 at 4, 12 and 64 layers are "
            f"{quoted(modes)}, in networks of the notebook's size; that of Figure 4a is unknown",
            n=10,
            reduced=True,
        ),
        bounded(
            "The vanilla ResNet-110 multiplies signals by up to 10^8 at initialisation",
            "UAI 5",
            "the largest log10, 7 to 9",
            row(vanilla, "largest log10").ours,
            low=7,
            high=9,
        ),
        bounded(
            "ReZero improves signal propagation in ResNet-110 by about 10^6",
            "UAI 5",
            "by how much the mean of log10 is nearer to 0, 5 to 7",
            [abs(a or 0) - abs(b or 0) for a, b in zip(before, after, strict=True)],
            low=5,
            high=7,
        ),
    ]


def plot(results: Results) -> Figure:
    """The panels of Figure 4."""
    figure, axes = drawing.sheet(TITLE, results.scale, SETTING[results.scale], 4, height=3.2)
    names = list(results.curves)
    net = "ResNet-8" if results.scale == "smoke" else "ResNet-110"
    panels = {
        "Transformers at initialisation": [n for n in names if n.startswith("post-norm")],
        "ReZero Transformer in training": [n for n in names if n.startswith(f"{DEEP}, ")],
        f"{net}, vanilla": [n for n in names if n.startswith("ResNet-110, ")],
        f"{net}, ReZero": [n for n in names if n.startswith("ResNet-110 + ReZero, ")],
    }
    panels["Transformers at initialisation"].sort(key=lambda name: int(name.split()[1]))
    for axis, (title, members) in zip(axes, panels.items(), strict=True):
        for name, colour in drawing.colours(members).items():
            shares = np.array(results.curves[name].y)
            edges = np.append(results.curves[name].x, results.curves[name].x[-1] + BIN) - BIN / 2
            label = name.removeprefix(f"{DEEP}, ").rpartition("ReZero, ")[2]
            axis.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
            axis.stairs(shares, edges, color=colour, label=label.removeprefix("ResNet-110, "))
        axis.set(title=title, xlabel="log10 of the singular values", ylabel="share")
        axis.legend(fontsize=8)
    return figure
