"""Super-convergence (supplement E.2): 94 % on CIFAR-10 in 45 epochs of one cycle of the rate."""

from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import Claim, all_or_none, bounded
from experiments.jobs import Job
from experiments.published import curve
from experiments.results import (
    Curve,
    Results,
    Row,
    find,
    gates_at_end,
    times_to,
    training_curve,
)
from experiments.statistics import Draw, paired
from rezero_jax.runs.reader import Run

RULES = {"ReZero": "rezero", "baseline": "residual"}
SHORT = (
    "model.width=16",
    "train.batch_size=128",
    "train.epochs=None",
    "train.steps=300",
    "eval.every_epochs=None",
)


def runs(scale: str) -> list[Job]:
    """ReZero and the baseline; in a smoke test ReZero alone, to save compilation."""
    jobs = []
    for setting, rule in RULES.items():
        config = f"resnet_superconvergence.py:residual={rule}"
        if scale == "smoke":
            config += ",smoke,epochs=1"
        job = Job(setting, f"superconvergence-{rule}", config, SHORT if scale == "cpu" else ())
        if scale != "smoke" or rule == "rezero":
            jobs.append(job)
    return jobs


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """When a run reaches 94 %, its final accuracy, and whether it survives the peak rate."""
    reduced = scale != "paper"
    make = partial(Row, reduced=reduced)
    rows, curves = [], {}
    for setting, seeds in runs.items():
        found = [run.evaluations("eval/accuracy") for run in seeds]
        ends = tuple(percent(run.final().get("eval/accuracy")) for run in seeds)
        survivors = [run for run in seeds if not run.diverged]
        rows += [
            make(setting, "epochs to 94 %", times_to(seeds, "accuracy", 0.94), True),
            make(setting, "accuracy % at the end", ends, True),
        ]
        for epoch, _ in curve("superconvergence", setting, "accuracy % after epoch"):
            after = tuple(percent(accuracies.get(int(epoch))) for accuracies in found)
            if None not in after:
                rows.append(make(setting, f"accuracy % after epoch {int(epoch)}", after))
        curves[setting] = training_curve(survivors or seeds, x="epoch")
        if all(found):
            tests = [(a.keys(), [100 * value for value in a.values()]) for a in found]
            curves[f"{setting}, test"] = Curve.of_runs(tests)
    rows.append(make("ReZero", "mean |alpha| at the end", gates_at_end(runs["ReZero"])))
    n, diverged = len(runs["ReZero"]), sum(run.diverged for run in runs["ReZero"])
    claims = [
        Claim(
            "With gates at a constant rate of 0.1 a peak rate of 1.2 does not diverge",
            "SUP 4",
            all_or_none(n - diverged, n),
            f"{diverged} of {n} runs diverged",
            n,
            reduced=reduced,
        )
    ]
    if "baseline" in runs:
        text = "ReZero reaches 94 % in fewer epochs than the baseline"
        fewer = paired(*(find(rows, setting, "epochs to 94 %").draws for setting in RULES))
        quantity = "epochs minus the baseline's"
        claims.append(bounded(text, "SUP 4", quantity, fewer, high=0, reduced=reduced))
    return Results("superconvergence", scale, rows, claims, curves)


def percent(fraction: float | None) -> Draw:
    """A fraction in percent; None stays None."""
    return None if fraction is None else 100 * fraction


def plot(results: Results) -> Figure:
    """The training loss of the runs that did not diverge, and the test accuracy by epoch."""
    tested = [setting for setting in RULES if f"{setting}, test" in results.curves]
    figure, axes = drawing.sheet_of(results, 1 + bool(tested))
    for setting, colour in drawing.colours(RULES).items():
        if setting in results.curves:
            row = find(results.rows, setting, "accuracy % at the end")
            label = f"{setting}, {row.shown}" if None in row.draws else setting
            drawing.line(axes[0], results.curves[setting], label, colour, width=1)
        if setting in tested:
            drawn = results.curves[f"{setting}, test"]
            drawing.line(axes[1], drawn, setting, colour)
            if results.scale == "paper":
                logged = curve("superconvergence", setting, "accuracy % after epoch")
                drawing.crosses(axes[1], logged, colour, until=drawn.x[-1])
    losses = [results.curves[setting].y for setting in RULES if setting in results.curves]
    highest = max(y for ys in losses for y in ys)
    axes[0].set(xlabel="epoch", ylabel="training cross entropy (nats)")
    axes[0].set_ylim(0, min(1.05 * highest, 5))  # a run that diverges leaves at the top
    axes[0].legend()
    if tested:
        axes[1].set(xlabel="epoch", ylabel="test accuracy (%)")
    return figure
