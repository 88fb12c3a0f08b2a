"""Table 1 of the supplement and Figure 7: how soon six 12-layer Transformers reach a target."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing, entropies
from experiments.published import curve, published, quoted
from experiments.results import Curve, Results, Runs, times_to
from experiments.statistics import Sample, decide, quotients, together
from rezero_jax.runs.reader import Run

# Bits per byte, on the validation split. The target of cpu is halfway between the bigram and the
# trigram entropy of the standard library, so that a net without layers does not reach it.
TARGETS = {"paper": 1.2, "cpu": 3.0, "smoke": 4.0}

OURS = "ReZero alpha = 0"
BASELINES = ("Post-Norm + warm-up", "Pre-Norm")
RULES = ("Post-Norm", *BASELINES, "GPT2-Norm", "ReZero alpha = 1", OURS)
TIME, BITS = "iterations to the target", "bits per byte after"
# The legend of Figure 7 does not fit the table, so these two go by their labels alone.
LABELLED = ('the curve labelled "Post-Norm"', 'the curve labelled "Pre-Norm"')


def measure(results: Results, runs: Runs) -> None:
    """Iterations to the target, and their speed-up over each baseline."""
    for setting, seeds in runs.items():
        found = times_to(seeds, "bits_per_byte", TARGETS[results.scale])
        results.add(setting, TIME, found)
        results.curves[setting] = Curve.logged(seeds, "eval/bits_per_byte")
    for baseline in BASELINES:
        for setting in runs if baseline in runs else ():
            of = quotients(results.row(baseline, TIME).draws, results.row(setting, TIME).draws)
            results.add(setting, f"speed-up over {baseline}", of, log=True)
    for setting, seeds in runs.items():
        marks = [int(x) for x, _ in curve("transformer12", OURS, BITS)]
        if results.scale != "paper":
            marks = [int(x) for x in results.curves[setting].x]
            marks = marks[len(marks) // 4 - 1 :: max(len(marks) // 4, 1)]
        for mark in marks:
            results.add(setting, f"{BITS} {mark} iterations", (_at(run, mark) for run in seeds))
    _judge(results, runs)
    results.levels = entropies.of_run(runs[OURS][0].folder)


def _at(run: Run, mark: int) -> float | None:
    """Bits per byte at the first evaluation at or after an iteration."""
    steps, bits = run.series("eval/bits_per_byte")
    after = np.flatnonzero(steps >= mark)
    return float(bits[after[0]]) if len(after) else None


def _judge(results: Results, runs: Runs) -> None:
    """Who is first, who follows, and whether Post-Norm diverges."""
    times, n = {setting: results.row(setting, TIME) for setting in runs}, len(runs[OURS])
    reached = [s for s in RULES if s in runs and times[s].reached == n]
    theirs = published("transformer12")
    order = sorted(reached, key=lambda setting: theirs[setting, TIME].value or np.inf)
    first = [(OURS, setting) for setting in reached if setting != OURS] if OURS in reached else []
    evidence = ", ".join(f"{setting} {quoted(times[setting].draws)}" for setting in reached)
    for text, pairs in (
        ("ReZero with alpha = 0 reaches the target first", first),
        ("Rules reach the target in the order of the paper's table", list(pairwise(order))),
    ):
        found = _all_later(results, pairs)
        results.claim(text, "SUP 2", found, evidence or "no rule in all runs", n)
    if "Post-Norm" in runs:
        lost = sum(run.diverged for run in runs["Post-Norm"])
        text, evidence = "Post-Norm without warm-up diverges", f"{lost} of {n} runs diverged"
        results.counted(text, "SUP 2", evidence, lost, n)


def _all_later(results: Results, pairs: Sequence[tuple[str, str]]) -> bool | None:
    """Whether the second rule of each pair is later, Holm-corrected; False if one is earlier."""

    def ratio(earlier: str, later: str) -> Sample:
        draws = (results.row(setting, TIME).draws for setting in (later, earlier))
        return Sample(quotients(*draws), log=True)

    verdicts = [decision.verdict for decision in decide([ratio(*pair) for pair in pairs], 1, 1)]
    return together([{"higher": True, "lower": False}.get(word) for word in verdicts])


def plot(results: Results) -> Figure:
    """Bits per byte by iteration; at the paper's scale with the points of Figure 7."""
    figure, (axis,) = drawing.sheet_of(results)
    paper, target = results.scale == "paper", TARGETS[results.scale]
    colours = drawing.colours(RULES)
    for setting in RULES:
        if setting in results.curves:
            drawing.line(axis, results.curves[setting], setting, colours[setting])
    for setting in (*results.curves, *LABELLED) if paper else ():
        read_off = curve("transformer12", setting, BITS)
        drawing.crosses(axis, read_off, colours.get(setting, "#999999"))
    drawing.target(axis, target, "target")
    drawing.bits_per_byte(axis, results, "iteration", "validation", [target])
    return figure
