"""Figure 5: the training loss of 32 fully connected layers in four architectures."""

import math

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.jobs import CONTROL
from experiments.published import curve, published
from experiments.results import Curve, Results, Row, Runs, times_to
from experiments.statistics import between, decide, holds, mapped, quotients, together, verdict

OURS, PLAIN, RES = "FC + ReZero", "FC", "FC + Res"
BASELINES = (PLAIN, "FC + Norm", RES)
PRIMARY = "0.1"  # the loss of the primary outcome, see protocol.md
FASTER = (7.0, 15.0)  # times, says the paper
TARGETS = ("1.2", "0.8", "0.4", "0.2", "0.1", "0.06")  # nats, as published.csv writes them
EPOCHS = (1, 2, 5, 10, 15, 20, 50, 100, 150, 200)


def measure(results: Results, runs: Runs) -> None:
    """Epochs to each loss, also as multiples of ReZero's, and the losses of some epochs."""
    for target in TARGETS:
        reached = {name: times_to(seeds, "loss", float(target)) for name, seeds in runs.items()}
        for setting, epochs in reached.items():
            results.add(setting, f"epochs to {target}", epochs)
        for setting in (*BASELINES, CONTROL):
            times = quotients(reached[setting], reached[OURS])
            results.add(setting, f"times ReZero's epochs to {target}", times, log=True)
    losses = {setting: [run.epoch_losses() for run in seeds] for setting, seeds in runs.items()}
    for setting, found in losses.items():
        for epoch in EPOCHS:
            if all(len(loss) >= epoch for loss in found):
                values = (float(loss[epoch - 1]) for loss in found)
                results.add(setting, f"loss of epoch {epoch}", values, log=True)
        results.curves[setting] = Curve.by_epoch(found)
    times_faster(results)
    text = "The ReZero net could not fit the data so fast without its layers (control)"
    quantity = f"ln of the ratio of losses in ReZero's last epoch, {CONTROL} over ReZero"
    gaps = map(_log_ratio_at_end, losses[OURS], losses[CONTROL])
    results.bounded(text, "UAI 6", quantity, gaps, low=0)
    results.remarks += [_secondary(results, target) for target in TARGETS]


def _log_ratio_at_end(ours: np.ndarray, control: np.ndarray) -> float:
    """ln(control / ours) in the last epoch of ours; NaN if the control ended before it."""
    end = len(ours) - 1
    return math.log(control[end] / ours[end]) if end < len(control) else math.nan


def _ratio(results: Results, setting: str, target: str) -> Row:
    return results.row(setting, f"times ReZero's epochs to {target}")


def times_faster(results: Results) -> None:
    """The primary outcome of protocol.md's E1, Holm-corrected, its parts, and a secondary one."""
    ratios = {setting: _ratio(results, setting, PRIMARY) for setting in BASELINES}
    decisions = decide(list(ratios.values()), *FASTER)
    n = len(ratios[PLAIN].draws)
    for (setting, ratio), above in zip(
        ratios.items(), decide([*ratios.values()], 1, 1), strict=True
    ):
        text = f"ReZero trains faster than {setting}"
        found, fields = holds(above.verdict, "higher"), {"interval": ratio.interval()}
        results.claim(text, "UAI 6", found, f"the ratio of epochs is {ratio.shown}", n, **fields)
    shown = ", ".join(f"{name} {ratio.shown}" for name, ratio in ratios.items())
    text = "ReZero fits the training data 7 to 15 times faster than its baselines"
    found = together([holds(decision.verdict) for decision in decisions])
    results.claim(text, "UAI 6", found, f"ratios of epochs to a loss of {PRIMARY}: {shown}", n)
    for (setting, ratio), decision in zip(ratios.items(), decisions, strict=True):
        corrected = decision.interval and f"; Holm-corrected {between(decision.interval)}"
        evidence = f"the ratio of epochs is {ratio.shown}{corrected or ''}"
        text, found = f"7 to 15 times faster than {setting}", holds(decision.verdict)
        results.claim(text, "UAI 6", found, evidence, n, interval=ratio.interval())
    res, plain = (results.row(name, f"epochs to {PRIMARY}").draws for name in (RES, PLAIN))
    text = "A residual connection alone makes the net slower than the plain one (secondary)"
    quantity = f"ln of the ratio of epochs to {PRIMARY}, {RES} over {PLAIN}"
    results.bounded(text, "UAI 6", quantity, mapped(math.log, quotients(res, plain)), low=0)


def _secondary(results: Results, target: str) -> str:
    """Uncorrected verdicts on the ratios to a loss against 7 to 15, and the control's ratio."""
    parts, theirs_inside = [], []
    for setting in BASELINES:
        ratio = _ratio(results, setting, target)
        interval = ratio.interval()
        parts.append(f"{setting} {verdict(interval, *FASTER) if interval else ratio.shown}")
        theirs = published("fc")[setting, ratio.metric].value or 0
        if interval and interval[0] <= theirs <= interval[1]:
            theirs_inside.append(setting)
    return (
        f"Ratios to {target} against 7 to 15: {', '.join(parts)}. {CONTROL.capitalize()}: "
        f"{_ratio(results, CONTROL, target).shown}. Our interval holds the figure's ratio for "
        f"{', '.join(theirs_inside) or 'none'}."
    )


def plot(results: Results) -> Figure:
    """The losses by epoch and the epochs to each loss; except in the smoke test with crosses."""
    figure, (axis,) = drawing.sheet_of(results)
    drawing.epoch_losses(axis, results, np.inf if results.scale == "smoke" else float(TARGETS[-1]))
    reached = [row for row in results.rows if row.metric.startswith("epochs to") and row.mean]
    ends = [x for drawn in results.curves.values() for x in drawn.x]
    ends += [interval[1] for row in reached if (interval := row.interval())]
    crossed = False
    for setting, colour in drawing.colours(results.curves).items():
        for row in reached:
            if row.setting == setting and (interval := row.interval()):
                target = float(row.metric.removeprefix("epochs to "))
                axis.plot(interval, [target] * 2, color=colour, lw=1)
                axis.plot(row.mean or 0, target, "o", color=colour, markersize=3)
        if results.scale != "smoke":
            read_off = curve("fc", setting, "loss of epoch")
            read_off += [(x, y) for y, x in curve("fc", setting, "epochs to")]
            crossed |= drawing.crosses(axis, read_off, colour, until=max(ends))
    drawing.legend(axis, "lines ours,\ncrosses digitised\nfrom the paper" if crossed else None)
    return figure
