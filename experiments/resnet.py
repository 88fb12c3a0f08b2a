"""Table 2 of the supplement and Figure 6: ResNets on CIFAR-10 under five residual rules."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import Claim, bounded
from experiments.jobs import Job
from experiments.published import curve
from experiments.results import Curve, Results, Row, find, times_to
from experiments.statistics import Censored, Draw, paired, quotients
from rezero_jax.analysis.theme import plain_ticks
from rezero_jax.runs.reader import Run

RULES = {
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


def runs(scale: str) -> list[Job]:
    """A run for each row of the table."""

    def job(net: str, suffix: str, rule: str, arguments: str) -> Job:
        short = net.lower().replace("-resnet-", "").replace("-", "")
        return Job(net + suffix, f"{short}-{rule}", f"resnet.py:residual={rule},{arguments}")

    if scale == "smoke":
        return [job("ResNet-8", *item, "smoke,epochs=1") for item in PREACT.items()]
    if scale == "cpu":
        return [job("ResNet-20", *item, "depth=20,epochs=10") for item in RULES.items()]
    jobs = [
        job(f"ResNet-{depth}", *item, f"depth={depth}")
        for depth in (56, 110)
        for item in RULES.items()
    ]
    return jobs + [
        job(f"PreAct-ResNet-{depth}", *item, f"family=preact,depth={depth}")
        for depth in (18, 50)
        for item in PREACT.items()
    ]


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The columns of the table, and the errors of Figure 6."""
    rows: list[Row] = []
    curves = {}
    make = partial(Row, reduced=scale != "paper")
    for setting, seeds in runs.items():
        net, _, rule = setting.partition(" + ")
        accuracies = [run.evaluations("eval/accuracy") for run in seeds]
        errors = [{epoch: 100 * (1 - a) for epoch, a in one.items()} for one in accuracies]
        ends: tuple[Draw, ...] = tuple(
            None if run.diverged else e[max(e)] for run, e in zip(seeds, errors, strict=True)
        )
        losses = [None if run.diverged else 1000 * run.epoch_losses()[-1].item() for run in seeds]
        rows.append(make(setting, "error %", ends, rule in ("", "ReZero")))
        for percent in TARGETS:
            times = times_to(seeds, "accuracy", percent / 100)
            rows.append(make(setting, f"epochs to {percent} %", times))
        rows.append(make(setting, "training loss x 1000", tuple(losses)))
        if rule:
            change = paired(ends, find(rows, net, "error %").draws)
            rows.append(make(setting, "change of error %", change))
        if rule == "ReZero":
            rows += [_fewer(rows, net, f"epochs to {percent} %") for percent in TARGETS]
        if net in (FIGURE_6, "ResNet-20"):
            for epoch in CURVE:
                if all(epoch in e for e in errors):
                    after = tuple(e[epoch] for e in errors)
                    rows.append(make(setting, f"error % after epoch {epoch}", after))
            if all(200 in e for e in errors):
                late = tuple(sum(e[i] for i in range(191, 201)) / 10 for e in errors)
                rows.append(make(setting, "error %, mean of epochs 191 to 200", late))
        curves[setting] = Curve.of_runs([(list(e), list(e.values())) for e in errors])
    claims = []
    for net in dict.fromkeys(setting.partition(" + ")[0] for setting in runs):
        claims += _claims(net, rows, scale != "paper")
    return Results("resnet", scale, rows, claims, curves)


def _fewer(rows: Sequence[Row], net: str, metric: str) -> Row:
    """By how many percent of the vanilla net's epochs ReZero takes fewer, in each pair."""
    vanilla, ours = (find(rows, name, metric) for name in (net, f"{net} + ReZero"))
    shares = quotients(ours.draws, vanilla.draws)
    fewer = tuple(
        math.nan if share is None or isinstance(share, Censored) else 100 * (1 - share)
        for share in shares
    )
    return Row(ours.setting, f"fewer {metric}, in %", fewer, reduced=ours.reduced)


def _claims(net: str, rows: Sequence[Row], reduced: bool) -> list[Claim]:
    """The paper's claims on ReZero and the vanilla net, by differences of pairs."""

    def differences(metric: str) -> tuple[Draw, ...]:
        return paired(*(find(rows, name, metric).draws for name in (f"{net} + ReZero", net)))

    text = f"ReZero reaches 80 % accuracy in fewer epochs than {net}"
    epochs = differences("epochs to 80 %")
    quantity = "epochs minus the vanilla net's"
    claims = [bounded(text, "SUP 3, UAI 2", quantity, epochs, high=0, reduced=reduced)]
    if net in LOWER:
        text = f"ReZero ends with a {'lower' if LOWER[net] else 'higher'} error than {net}"
        low, high = (-math.inf, 0) if LOWER[net] else (0, math.inf)
        quantity, errors = "error (%) minus the vanilla net's", differences("error %")
        claims.append(bounded(text, "SUP 3", quantity, errors, low, high, reduced=reduced))
    return claims


def plot(results: Results) -> Figure:
    """The error by epoch, and Figure 6 as crosses."""
    nets = list(dict.fromkeys(setting.partition(" + ")[0] for setting in results.curves))
    figure, axes = drawing.sheet_of(results, panels=len(nets))
    colours = drawing.colours(RULES)
    for net, axis in zip(nets, axes, strict=True):
        last, crossed = 0.0, False
        for suffix, colour in colours.items():
            if net + suffix in results.curves:
                drawn = results.curves[net + suffix]
                last = max([last, *drawn.x])
                drawing.line(axis, drawn, suffix.removeprefix(" + ") or "vanilla", colour)
            if net == FIGURE_6:
                figure_6 = curve("resnet", f"ResNet-110{suffix}", "error % after epoch")
                crossed |= drawing.crosses(axis, figure_6, colour, until=last)
        axis.set(title=net, xlabel="epoch", ylabel="test error (%)", yscale="log")
        plain_ticks(axis)
        axis.legend(title="crosses digitised from the paper" if crossed else None)
    return figure
