"""Table 2 of the supplement and Figure 6: ResNets on CIFAR-10 under five residual rules."""

import math

from matplotlib.figure import Figure

from experiments import drawing
from experiments.published import curve
from experiments.results import Curve, Results, Runs, times_to
from experiments.statistics import Censored, quotients
from rezero_jax.analysis.theme import plain_ticks

RULES = ("", " + Gated", " + zero gamma", " + FixUp", " + ReZero")
LOWER = {  # whether ReZero's final error is lower than the vanilla net's in the paper
    "ResNet-56": False,
    "ResNet-110": True,
    "PreAct-ResNet-18": True,
    "PreAct-ResNet-50": True,
}
TARGETS = (80, 85)  # % accuracy
FIGURE_6 = "ResNet-110"
CURVE = (1, 2, 5, 10, 20, 50, 101, 150, 151)  # epochs of Figure 6


def measure(results: Results, runs: Runs) -> None:
    """The columns of the table, and the errors of Figure 6."""
    early = _early(results)
    for setting, seeds in runs.items():
        net, _, rule = setting.partition(" + ")
        accuracies = [run.evaluations("eval/accuracy") for run in seeds]
        errors = [{epoch: 100 * (1 - a) for epoch, a in one.items()} for one in accuracies]
        results.curves[setting] = Curve.of_runs([(list(e), list(e.values())) for e in errors])
        ends = (None if run.diverged else e[max(e)] for run, e in zip(seeds, errors, strict=True))
        losses = (None if run.diverged else 1000 * run.epoch_losses()[-1].item() for run in seeds)
        results.add(setting, "error %", ends)
        for percent in TARGETS:
            epochs = times_to(seeds, "accuracy", percent / 100)
            results.add(setting, f"epochs to {percent} %", epochs, reduced=early)
        results.add(setting, "training loss x 1000", losses)
        if rule:
            change = results.differences("error %", setting, net)
            results.add(setting, "change of error %", change)
        if rule == "ReZero":
            for percent in TARGETS:
                _add_fewer(results, net, f"epochs to {percent} %")
        if net in (FIGURE_6, "ResNet-20"):
            for epoch in CURVE:
                if all(epoch in e for e in errors):
                    results.add(setting, f"error % after epoch {epoch}", (e[epoch] for e in errors))
            if all(200 in e for e in errors):
                late = (sum(e[i] for i in range(191, 201)) / 10 for e in errors)
                results.add(setting, "error %, mean of epochs 191 to 200", late)
    for net in _nets(runs):
        _judge(results, net)


def _early(results: Results) -> bool:
    """Whether the first epochs are reduced; scale gpu has the paper's until the first milestone."""
    return results.reduced and results.scale != "gpu"


def _nets(settings: Runs | dict[str, Curve]) -> list[str]:
    return list(dict.fromkeys(setting.partition(" + ")[0] for setting in settings))


def _add_fewer(results: Results, net: str, metric: str) -> None:
    """By how many percent of the vanilla net's epochs ReZero takes fewer, in each pair."""
    vanilla, ours = (results.row(name, metric) for name in (net, f"{net} + ReZero"))
    fewer = (
        math.nan if share is None or isinstance(share, Censored) else 100 * (1 - share)
        for share in quotients(ours.draws, vanilla.draws)
    )
    results.add(ours.setting, f"fewer {metric}, in %", fewer, reduced=_early(results))


def _judge(results: Results, net: str) -> None:
    """The paper's claims on ReZero and the vanilla net, by differences of pairs."""
    text, ours = f"ReZero reaches 80 % accuracy in fewer epochs than {net}", f"{net} + ReZero"
    gaps = results.differences("epochs to 80 %", ours, net)
    quantity = "epochs minus the vanilla net's"
    results.bounded(text, "SUP 3, UAI 2", quantity, gaps, high=0, reduced=_early(results))
    quantity, gaps = "error (%) minus the vanilla net's", results.differences("error %", ours, net)
    if net in LOWER:
        text = f"ReZero ends with a {'lower' if LOWER[net] else 'higher'} error than {net}"
        bounds = (-math.inf, 0) if LOWER[net] else (0, math.inf)
        results.bounded(text, "SUP 3", quantity, gaps, *bounds)
    else:  # ours alone: protocol.md's T3
        text = f"ReZero ends with a lower error than {net}"
        results.bounded(text, "", quantity, gaps, high=0, reduced=False)


def plot(results: Results) -> Figure:
    """The error by epoch, and Figure 6 as crosses."""
    nets = _nets(results.curves)
    figure, axes = drawing.sheet_of(results, panels=len(nets))
    for net, axis in zip(nets, axes, strict=True):
        last, crossed = 0.0, False
        for suffix, colour in drawing.colours(RULES).items():
            if net + suffix in results.curves:
                drawn = results.curves[net + suffix]
                last = max([last, *drawn.x])
                drawing.line(axis, drawn, suffix.removeprefix(" + ") or "vanilla", colour)
            if net == FIGURE_6:
                figure_6 = curve("resnet", f"ResNet-110{suffix}", "error % after epoch")
                crossed |= drawing.crosses(axis, figure_6, colour, until=last)
        axis.set(title=net, xlabel="epoch", ylabel="test error (%)", yscale="log")
        plain_ticks(axis)
        drawing.legend(axis, "crosses digitised\nfrom the paper" if crossed else None)
    return figure
