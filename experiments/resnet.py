"""Table 2 of the supplement and Figure 6: ResNets on CIFAR-10 under five residual schemes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import Claim, bounded, paired
from experiments.jobs import Job
from experiments.published import curve
from experiments.results import Curve, Results, Row, find
from rezero_jax.analysis.plots.theme import plain_ticks
from rezero_jax.runs.reader import Run

TITLE = "ResNets under five residual schemes"
SOURCE = "SUP Table 2, UAI Figure 6"
SEEDS = 3
SETTING = {
    "paper": "CIFAR-10, 200 epochs of batches of 128, SGD 0.1, a tenth at epochs 100 and 150; "
    "probably 3 runs in the paper, which does not say.",
    "cpu": "Reduced: ResNet-20 on CIFAR-10 and 10 epochs, with the milestones at the same "
    "fractions.",
    "smoke": "Reduced: 8 layers of width 4 on scikit-learn's digits, an epoch.",
}

SCHEMES = {
    "": "residual",
    " + Gated": "gated",
    " + zero gamma": "zero_gamma",
    " + FixUp": "fixup",
    " + ReZero": "rezero",
}
PREACT = {"": "residual", " + ReZero": "rezero"}
LOWER = {  # whether ReZero's final error is lower than the vanilla net's in the paper
    "ResNet-56": False,
    "ResNet-110": True,
    "PreAct-ResNet-18": True,
    "PreAct-ResNet-50": True,
}
TARGETS = (80, 85)  # % accuracy
FIGURE_6 = "ResNet-110"
CURVE = (1, 2, 5, 10, 20, 50, 101, 150, 151)  # epochs of Figure 6
NOTES = (
    "The error is that of the last epoch, on the test set, as the authors' code evaluates; the "
    "paper does not say whether it reports the last epoch or the best. Epochs to 80 % are the "
    "first epoch that ends at an accuracy of 80 % or more. Of Figure 6 the epochs are the numbers "
    "of the curve's vertices.",
)


def runs(scale: str) -> list[Job]:
    """A run for each row of the table."""

    def job(net: str, scheme: str, rule: str, arguments: str) -> Job:
        short = net.lower().replace("-resnet-", "").replace("-", "")
        return Job(net + scheme, f"{short}-{rule}", f"resnet.py:residual={rule},{arguments}")

    if scale == "smoke":
        chosen = ("residual", "rezero")
        return [
            job("ResNet-8", scheme, rule, "smoke,epochs=1")
            for scheme, rule in SCHEMES.items()
            if rule in chosen
        ]
    if scale == "cpu":
        return [job("ResNet-20", *item, "depth=20,epochs=10") for item in SCHEMES.items()]
    jobs = [
        job(f"ResNet-{depth}", *item, f"depth={depth}")
        for depth in (56, 110)
        for item in SCHEMES.items()
    ]
    return jobs + [
        job(f"PreAct-ResNet-{depth}", *item, f"family=preact,depth={depth}")
        for depth in (18, 50)
        for item in PREACT.items()
    ]


def _errors(run: Run) -> dict[int, float]:
    """Epoch -> test error (%) after it."""
    accuracies = run.evaluations("eval/accuracy")
    return {epoch: 100 * (1 - accuracy) for epoch, accuracy in accuracies.items()}


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The columns of the table, and the errors of Figure 6."""
    rows: list[Row] = []
    curves = {}
    make = partial(Row, reduced=scale != "paper", missing="diverged")
    for setting, seeds in runs.items():
        net, _, scheme = setting.partition(" + ")
        found = [_errors(run) for run in seeds]
        headline = scheme in ("", "ReZero")
        ends = [None if run.diverged else e[max(e)] for run, e in zip(seeds, found, strict=True)]
        losses = [None if run.diverged else 1000 * run.epoch_losses()[-1].item() for run in seeds]
        rows += [
            make(setting, "error %", tuple(ends), headline),
            *(
                make(setting, f"epochs to {percent} %", times, missing="not reached")
                for percent in TARGETS
                for times in [tuple(run.time_to("accuracy", percent / 100) for run in seeds)]
            ),
            make(setting, "training loss x 1000", tuple(losses)),
        ]
        if scheme:
            change = paired(ends, find(rows, net, "error %").ours)
            rows.append(make(setting, "change of error %", change))
        if scheme == "ReZero":
            rows += [_fewer(rows, make, net, percent) for percent in TARGETS]
        if net in (FIGURE_6, "ResNet-20"):
            for epoch in CURVE:
                if all(epoch in e for e in found):
                    after = tuple(e[epoch] for e in found)
                    rows.append(make(setting, f"error % after epoch {epoch}", after))
            if all(200 in e for e in found):
                late = tuple(sum(e[i] for i in range(191, 201)) / 10 for e in found)
                rows.append(make(setting, "error %, mean of epochs 191 to 200", late))
        curves[setting] = Curve.of_runs([(list(e), list(e.values())) for e in found])
    claims = []
    for net in dict.fromkeys(setting.partition(" + ")[0] for setting in runs):
        claims += _claims(net, rows, scale != "paper")
    return Results("resnet", scale, rows, claims, curves)


def _fewer(rows: Sequence[Row], make: Callable[..., Row], net: str, percent: int) -> Row:
    """How many fewer epochs ReZero takes, in percent of the vanilla net's, of each pair."""
    quantity = f"epochs to {percent} %"
    names = (net, f"{net} + ReZero")
    pairs = zip(*(find(rows, name, quantity).ours for name in names), strict=True)
    fewer = tuple(100 * (a - b) / a if a and b else None for a, b in pairs)
    return make(f"{net} + ReZero", f"fewer {quantity}, in %", fewer, missing="not reached")


def _claims(net: str, rows: Sequence[Row], reduced: bool) -> list[Claim]:
    """What the paper finds of ReZero against the vanilla net, by differences of pairs."""
    judged = partial(bounded, reduced=reduced, seeds=SEEDS)

    def differences(quantity: str) -> tuple[float | None, ...]:
        one, other = (find(rows, name, quantity).ours for name in (f"{net} + ReZero", net))
        return paired(one, other)

    claims = [
        judged(
            f"ReZero reaches 80 % accuracy in fewer epochs than {net}",
            "SUP 3, UAI 2",
            "epochs less the vanilla net's",
            differences("epochs to 80 %"),
            high=0,
        )
    ]
    if net in LOWER:
        side = "lower" if LOWER[net] else "higher"
        claims.append(
            judged(
                f"ReZero ends with a {side} error than {net}",
                "SUP 3",
                "error (%) less the vanilla net's",
                differences("error %"),
                low=-np.inf if LOWER[net] else 0,
                high=0 if LOWER[net] else np.inf,
            )
        )
    return claims


def plot(results: Results) -> Figure:
    """The error by epoch, and Figure 6 as crosses."""
    nets = list(dict.fromkeys(setting.partition(" + ")[0] for setting in results.curves))
    figure, axes = drawing.sheet(TITLE, results.scale, SETTING[results.scale], panels=len(nets))
    colours = drawing.colours(list(SCHEMES))
    for net, axis in zip(nets, axes, strict=True):
        last, crossed = 0.0, False
        for scheme, colour in colours.items():
            if net + scheme in results.curves:
                drawn = results.curves[net + scheme]
                last = max([last, *drawn.x])
                drawing.line(axis, drawn, scheme.removeprefix(" + ") or "vanilla", colour)
            if net == FIGURE_6:
                figure_6 = curve("resnet", f"ResNet-110{scheme}", "error % after epoch")
                crossed |= drawing.crosses(axis, figure_6, colour, until=last)
        axis.set(title=net, xlabel="epoch", ylabel="test error (%)", yscale="log")
        plain_ticks(axis)
        axis.legend(title="crosses digitised from the paper" if crossed else None)
    return figure
