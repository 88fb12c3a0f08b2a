"""Super-convergence (supplement E.2): 94 % on CIFAR-10 in 45 epochs of one cycle of the rate."""

from matplotlib.figure import Figure

from experiments import drawing
from experiments.published import curve
from experiments.results import ALPHA_AT_END, Curve, Results, Runs, gates_at_end, times_to
from experiments.statistics import Draw

RULES = ("ReZero", "baseline")
TIME, AFTER = "epochs to 94 %", "accuracy % after epoch"


def measure(results: Results, runs: Runs) -> None:
    """When a run reaches 94 %, its final accuracy, and whether it survives the peak rate."""
    for setting, seeds in runs.items():
        found = [run.evaluations("eval/accuracy") for run in seeds]
        results.add(setting, TIME, times_to(seeds, "accuracy", 0.94))
        ends = (percent(run.final().get("eval/accuracy")) for run in seeds)
        results.add(setting, "accuracy % at the end", ends)
        for epoch, _ in curve("superconvergence", setting, AFTER):
            after = [percent(accuracies.get(int(epoch))) for accuracies in found]
            if None not in after:
                results.add(setting, f"{AFTER} {int(epoch)}", after)
        survivors = [run for run in seeds if not run.diverged]
        results.curves[setting] = Curve.logged(survivors or seeds, x="epoch")
        if all(found):
            tests = [(a.keys(), [100 * value for value in a.values()]) for a in found]
            results.curves[f"{setting}, test"] = Curve.of_runs(tests)
    results.add("ReZero", ALPHA_AT_END, gates_at_end(runs["ReZero"]))
    n, diverged = len(runs["ReZero"]), sum(run.diverged for run in runs["ReZero"])
    text = "With gates at a constant rate of 0.1 a peak rate of 1.2 does not diverge"
    results.counted(text, "SUP 4", f"{diverged} of {n} runs diverged", n - diverged, n)
    if "baseline" in runs:
        text = "ReZero reaches 94 % in fewer epochs than the baseline"
        fewer = results.differences(TIME, *RULES)
        results.bounded(text, "SUP 4", "epochs minus the baseline's", fewer, high=0)


def percent(fraction: float | None) -> Draw:
    """A fraction in percent; None stays None."""
    return None if fraction is None else 100 * fraction


def plot(results: Results) -> Figure:
    """The training loss of the runs that did not diverge, and the test accuracy by epoch."""
    tested = [setting for setting in RULES if f"{setting}, test" in results.curves]
    figure, axes = drawing.sheet_of(results, 1 + bool(tested))
    for setting, colour in drawing.colours(RULES).items():
        if setting in results.curves:
            row = results.row(setting, "accuracy % at the end")
            label = f"{setting}, {row.shown}" if None in row.draws else setting
            drawing.line(axes[0], results.curves[setting], label, colour, width=1)
        if setting in tested:
            drawn = results.curves[f"{setting}, test"]
            drawing.line(axes[1], drawn, setting, colour)
            if results.scale == "paper":
                logged = curve("superconvergence", setting, AFTER)
                drawing.crosses(axes[1], logged, colour, until=drawn.x[-1])
    losses = [results.curves[setting].y for setting in RULES if setting in results.curves]
    highest = max(y for ys in losses for y in ys)
    axes[0].set(xlabel="epoch", ylabel="training cross entropy (nats)")
    axes[0].set_ylim(0, min(1.05 * highest, 5))  # a run that diverges leaves at the top
    drawing.legend(axes[0])
    if tested:
        axes[1].set(xlabel="epoch", ylabel="test accuracy (%)")
    return figure
