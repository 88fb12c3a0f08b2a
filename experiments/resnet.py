"""Table 2 of the supplement and Figure 6: ResNets on CIFAR-10 under five residual schemes."""

from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from experiments import drawing
from experiments.jobs import Job
from experiments.published import curve
from experiments.results import Claim, Curve, Results, Row, find, lower, quoted
from rezero_jax.analysis.plots.theme import plain_ticks
from rezero_jax.formatting import number
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
CURVE = (1, 2, 5, 10, 20, 50, 101, 150, 151)  # epochs of Figure 6
NOTES = (
    "The error is that of the last epoch, on the test set, as the authors' code evaluates; the "
    "paper does not say whether it reports the last epoch or the best. Epochs to 80 % are the "
    "first epoch that ends at an accuracy of 80 % or more. Crosses in the plot are Figure 6, "
    "of ResNet-110.",
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
    for setting, seeds in runs.items():
        net, _, scheme = setting.partition(" + ")
        of = setting if scale == "paper" else "ResNet-56" + " + " * bool(scheme) + scheme
        make = partial(Row, reduced=scale != "paper", against=of, missing="diverged")
        found = [_errors(run) for run in seeds]
        headline = scheme in ("", "ReZero")
        ends = [None if run.diverged else e[max(e)] for run, e in zip(seeds, found, strict=True)]
        times = tuple(run.time_to("accuracy", 0.8) for run in seeds)
        losses = [None if run.diverged else 1000 * run.epoch_losses()[-1].item() for run in seeds]
        rows += [
            make(setting, "error %", tuple(ends), headline),
            make(setting, "epochs to 80 %", times, missing="not reached"),
            make(setting, "training loss x 1000", tuple(losses)),
        ]
        if scheme:
            pairs = zip(ends, find(rows, net, "error %").ours, strict=True)
            change = tuple(None if None in pair else pair[0] - pair[1] for pair in pairs)  # type: ignore
            rows.append(make(setting, "change of error %", change))
        if scale != "paper" or net == "ResNet-110":
            against = of.replace("56", "110")
            for epoch in CURVE:
                if all(epoch in e for e in found):
                    after = tuple(e[epoch] for e in found)
                    quantity = f"error % after epoch {epoch}"
                    rows.append(make(setting, quantity, after, against=against))
            if all(200 in e for e in found):
                late = tuple(sum(e[i] for i in range(191, 201)) / 10 for e in found)
                quantity = "error %, mean of epochs 191 to 200"
                rows.append(make(setting, quantity, late, against=against))
        curves[setting] = Curve.of_runs([(list(e), list(e.values())) for e in found])
    claims = []
    for net in dict.fromkeys(setting.partition(" + ")[0] for setting in runs):
        claims += _claims(net, rows)
    return Results("resnet", scale, rows, claims, curves)


def _claims(net: str, rows: Sequence[Row]) -> list[Claim]:
    """What the paper finds of ReZero against the vanilla net."""
    rezero = f"{net} + ReZero"
    theirs, ours = (find(rows, name, "epochs to 80 %").mean for name in (net, rezero))
    both = theirs and ours
    fewer = " (at 110 layers 39 % fewer)" if net in ("ResNet-110", "ResNet-20") else ""
    claims = [
        Claim(
            f"ReZero reaches 80 % accuracy in fewer epochs than {net}{fewer}",
            "SUP 3, UAI 2",
            ours < theirs if theirs and ours else None,
            f"{quoted([ours])} against {quoted([theirs])} epochs"
            if both
            else "not both reached 80 %",
        )
    ]
    if net in LOWER:
        vanilla, gated = (find(rows, name, "error %") for name in (net, rezero))
        ahead = lower(gated, vanilla)
        ends = f"{number(gated.mean or 0)} against {number(vanilla.mean or 0)} %"
        claims.append(
            Claim(
                f"ReZero ends with a {'lower' if LOWER[net] else 'higher'} error than {net}",
                "SUP 3",
                None if ahead is None else ahead is LOWER[net],
                ends if ahead is not None else f"{ends}: too close, or too few runs, to tell",
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
            if net in ("ResNet-20", "ResNet-110"):
                figure_6 = curve("resnet", f"ResNet-110{scheme}", "error % after epoch")
                crossed |= drawing.crosses(axis, figure_6, colour, until=last)
        axis.set(title=net, xlabel="epoch", ylabel="test error (%)", yscale="log")
        plain_ticks(axis)
        axis.legend(title="crosses: the paper's ResNet-110" if crossed else None)
    return figure
