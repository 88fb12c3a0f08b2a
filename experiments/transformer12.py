"""Table 1 of the supplement and Figure 7: how soon six 12-layer Transformers reach a target."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing, entropies
from experiments.claims import Claim, all_or_none, quoted
from experiments.jobs import Job
from experiments.published import curve, published
from experiments.results import Results, Row, find, times_to, training_curve
from experiments.statistics import Draw, Sample, decide, quotients, together
from rezero_jax.runs.reader import Run

# Bits per byte, on the validation split. The target of cpu is halfway between the bigram and the
# trigram entropy of the standard library, so that a net without layers does not reach it.
TARGETS = {"paper": 1.2, "cpu": 3.0, "smoke": 4.0}

RULES = {
    "Post-Norm": "residual=post_norm",
    "Post-Norm + warm-up": "residual=post_norm,warmup=100",
    "Pre-Norm": "residual=pre_norm",
    "GPT2-Norm": "residual=gpt2_norm",
    "ReZero alpha = 1": "residual=rezero,alpha_init=1",
    "ReZero alpha = 0": "residual=rezero",
}
OURS = "ReZero alpha = 0"
BASELINES = ("Post-Norm + warm-up", "Pre-Norm")
TIME = "iterations to the target"
# The legend of Figure 7 does not fit the table, so these two go by their labels alone.
LABELLED = ('the curve labelled "Post-Norm"', 'the curve labelled "Pre-Norm"')
SMOKE = ("eval.every_steps=10", "eval.examples=16", "eval.batch_size=16")


def job(setting: str, scale: str) -> Job:
    """The run of a setting."""
    rule = RULES[setting]
    name = "transformer12-" + rule.removeprefix("residual=").replace(",", "-").replace("=", "")
    if scale == "paper":
        return Job(setting, name, f"transformer_enwik8.py:layers=12,{rule}", test=True)
    if scale == "cpu":
        return Job(setting, name, f"transformer_reduced.py:{rule}")
    return Job(setting, name, f"transformer_reduced.py:{rule},smoke,steps=20", SMOKE)


def runs(scale: str) -> list[Job]:
    """One of each rule; in a smoke test only three, to save compilation."""
    chosen = ("Pre-Norm", "ReZero alpha = 1", OURS) if scale == "smoke" else tuple(RULES)
    return [job(setting, scale) for setting in chosen]


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """Iterations to the target, and their speed-up over each baseline."""
    make = partial(Row, reduced=scale != "paper")
    rows, curves = [], {}
    for setting, seeds in runs.items():
        found = times_to(seeds, "bits_per_byte", TARGETS[scale])
        rows.append(make(setting, TIME, found, setting in (OURS, BASELINES[0])))
        curves[setting] = training_curve(seeds, "eval/bits_per_byte")
    for baseline in (baseline for baseline in BASELINES if baseline in runs):
        reference = find(rows, baseline, TIME).draws
        for setting in runs:
            speed_up = quotients(reference, find(rows, setting, TIME).draws)
            rows.append(make(setting, f"speed-up over {baseline}", speed_up, log=True))
    for setting, seeds in runs.items():
        marks = [int(x) for x, _ in curve("transformer12", OURS, "bits per byte after")]
        if scale != "paper":
            marks = [int(x) for x in curves[setting].x]
            marks = marks[len(marks) // 4 - 1 :: max(len(marks) // 4, 1)]
        for mark in marks:
            bits = tuple(_at(run, mark) for run in seeds)
            rows.append(make(setting, f"bits per byte after {mark} iterations", bits))
    claims = _claims(rows, runs, scale != "paper")
    levels = entropies.of_run(runs[OURS][0])
    return Results("transformer12", scale, rows, claims, curves, levels=levels)


def _at(run: Run, mark: int) -> float | None:
    """Bits per byte at the first evaluation at or after an iteration."""
    steps, bits = run.series("eval/bits_per_byte")
    after = np.flatnonzero(steps >= mark)
    return float(bits[after[0]]) if len(after) else None


def _claims(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], reduced: bool) -> list[Claim]:
    times = {setting: find(rows, setting, TIME) for setting in runs}
    n = len(runs[OURS])
    reached = [s for s in RULES if s in runs and times[s].reached == n]
    theirs = published("transformer12")
    order = sorted(reached, key=lambda setting: theirs[setting, TIME].value or np.inf)
    evidence = ", ".join(f"{setting} {quoted(times[setting].draws)}" for setting in reached)
    make = partial(Claim, source="SUP 2", n=n, reduced=reduced)
    first = [(OURS, setting) for setting in reached if setting != OURS] if OURS in reached else []
    claims = [
        make(text, holds=_all_later(times, pairs), evidence=evidence or "no rule in all runs")
        for text, pairs in (
            ("ReZero with alpha = 0 reaches the target first", first),
            ("Rules reach the target in the order of the paper's table", list(pairwise(order))),
        )
    ]
    if "Post-Norm" in runs:
        lost = sum(run.diverged for run in runs["Post-Norm"])
        text, evidence = "Post-Norm without warm-up diverges", f"{lost} of {n} runs diverged"
        claims.append(make(text, holds=all_or_none(lost, n), evidence=evidence))
    return claims


def _all_later(times: Mapping[str, Row], pairs: Sequence[tuple[str, str]]) -> bool | None:
    """Whether the second rule of each pair is later, after Holm's correction.

    False if the second rule of one pair is significantly earlier.
    """

    def ratio(earlier: str, later: str) -> Sample:
        draws: tuple[Draw, ...] = quotients(times[later].draws, times[earlier].draws)
        return Sample(draws, log=True)

    verdicts = [decision.verdict for decision in decide([ratio(*pair) for pair in pairs], 1, 1)]
    return together([{"higher": True, "lower": False}.get(word) for word in verdicts])


def plot(results: Results) -> Figure:
    """Bits per byte by iteration; at the paper's scale with the points of Figure 7."""
    figure, (axis,) = drawing.sheet_of(results)
    for setting, colour in drawing.colours(RULES).items():
        if setting in results.curves:
            drawing.line(axis, results.curves[setting], setting, colour)
            if results.scale == "paper":
                read_off = curve("transformer12", setting, "bits per byte after")
                drawing.crosses(axis, read_off, colour)
    if results.scale == "paper":
        for label in LABELLED:
            drawing.crosses(axis, curve("transformer12", label, "bits per byte after"), "#999999")
    drawing.target(axis, TARGETS[results.scale], "target")
    drawing.bits_per_byte(axis, results, "iteration", "validation", [TARGETS[results.scale]])
    return figure
