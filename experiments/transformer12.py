"""Table 1 of the supplement and Figure 7: how soon six 12-layer Transformers reach a target."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.jobs import Job
from experiments.published import curve, published
from experiments.results import Claim, Curve, Results, Row, find, quoted
from rezero_jax.formatting import number
from rezero_jax.runs.reader import Run

TITLE = "Transformers under six rules: iterations to a target"
SOURCE = "SUP Table 1, UAI Figure 7"
SEEDS = 1
TARGETS = {"paper": 1.2, "cpu": 3.45, "smoke": 4.0}  # bits per byte, on the validation split
SETTING = {
    "paper": "12 layers, enwik8, width 512, 512 bytes, batches of 1,080, LAMB 0.016; the target "
    "is 1.2 bits per byte, looked for once an epoch (163 iterations).",
    "cpu": "Reduced: 12 layers of width 128, 16 times 128 bytes, 500 iterations, another text; "
    "the target is 3.45 bits per byte on 32 KiB of validation text, looked for every 25 "
    "iterations.",
    "smoke": "Reduced: 2 layers of width 16, 20 iterations; the target is 4 bits per byte.",
}

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
# The legend of Figure 7 does not fit the table, so these two go by their labels alone.
LABELLED = ('the curve labelled "Post-Norm"', 'the curve labelled "Pre-Norm"')
SMOKE = ("eval.every_steps=10", "eval.examples=16", "eval.batch_size=16")
NOTES = (
    "The paper's speed-ups are over Post-Norm with a warm-up; those over Pre-Norm "
    "follow from its iterations. In Figure 7 the labels Post-Norm and Pre-Norm do not fit the "
    "table and seem to be swapped, so the two curves are stored under their labels only.",
)


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
    """One of each rule; in a smoke test only three, as each takes long to compile."""
    chosen = ("Pre-Norm", "ReZero alpha = 1", OURS) if scale == "smoke" else tuple(RULES)
    return [job(setting, scale) for setting in chosen]


def _bits(run: Run) -> dict[float, float]:
    """Iteration -> bits per byte of the evaluation after it."""
    return dict(zip(*run.series("eval/bits_per_byte"), strict=True))


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """Iterations to the target, and their speed-up over each baseline."""
    make = partial(Row, reduced=scale != "paper")
    rows, curves = [], {}
    target, quantity = TARGETS[scale], "iterations to the target"
    for setting, seeds in runs.items():
        found = tuple(run.time_to("bits_per_byte", target) for run in seeds)
        word = "diverged" if all(run.diverged for run in seeds) else "not reached"
        rows.append(make(setting, quantity, found, setting in (OURS, BASELINES[0]), missing=word))
        curves[setting] = Curve.of_runs([run.series("eval/bits_per_byte") for run in seeds])
    for baseline in BASELINES:
        reference = find(rows, baseline, quantity).mean if baseline in runs else None
        for setting in runs if reference else ():
            steps = find(rows, setting, quantity).ours
            speed_up = tuple(reference / s if s and reference else None for s in steps)
            rows.append(make(setting, f"speed-up over {baseline}", speed_up))
    for setting, seeds in runs.items():
        marks = [int(x) for x, _ in curve("transformer12", OURS, "bits per byte after")]
        if scale != "paper":
            marks = [int(x) for x in curves[setting].x]
            marks = marks[len(marks) // 4 - 1 :: max(len(marks) // 4, 1)]
        for mark in marks:
            bits = [_at(_bits(run), mark) for run in seeds]
            rows.append(make(setting, f"bits per byte after {mark} iterations", tuple(bits)))
    return Results("transformer12", scale, rows, _claims(rows, runs), curves)


def _at(bits: Mapping[float, float], mark: int) -> float | None:
    """The first evaluation at or after an iteration."""
    after = [step for step in bits if step >= mark]
    return bits[min(after)] if after else None


def _claims(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]]) -> list[Claim]:
    steps = {setting: find(rows, setting, "iterations to the target").mean for setting in runs}
    reached = [setting for setting in RULES if steps.get(setting) is not None]
    order = sorted(reached, key=lambda setting: steps[setting] or 0)
    told = ", ".join(f"{setting} {number(steps[setting] or 0)}" for setting in order)
    evidence = told or "nothing reached the target"
    theirs = {s: published("transformer12")[s, "iterations to the target"].value for s in reached}
    expected = sorted(reached, key=lambda setting: theirs[setting] or np.inf)
    claims = [
        Claim(
            "ReZero with alpha = 0 is the first at the target",
            "SUP 2",
            order[0] == OURS if len(reached) > 1 and steps[OURS] else None,
            evidence,
        ),
        Claim(
            "Those that arrive do so in the order of the paper's table",
            "SUP 2",
            order == expected if len(reached) > 2 else None,
            evidence,
        ),
    ]
    if "Post-Norm" in runs:
        best = [min(_bits(run).values(), default=np.nan) for run in runs["Post-Norm"]]
        claims.append(
            Claim(
                "Post-Norm without warm-up does not train",
                "SUP 2",
                steps["Post-Norm"] is None,
                f"{sum(run.diverged for run in runs['Post-Norm'])} of {len(best)} runs diverged; "
                f"their best is {quoted(best)} bits per byte",
            )
        )
    return claims


def plot(results: Results) -> Figure:
    """Bits per byte by iteration; at the paper's scale with the points of Figure 7."""
    figure, (axis,) = drawing.sheet(TITLE, results.scale, SETTING[results.scale])
    for setting, colour in drawing.colours(RULES).items():
        if setting in results.curves:
            drawing.line(axis, results.curves[setting], setting, colour)
            if results.scale == "paper":
                read_off = curve("transformer12", setting, "bits per byte after")
                drawing.crosses(axis, read_off, colour)
    if results.scale == "paper":
        for label in LABELLED:
            drawing.crosses(axis, curve("transformer12", label, "bits per byte after"), "#999999")
    axis.axhline(TARGETS[results.scale], color="#888888", lw=0.8, ls=":")
    values = [y for drawn in results.curves.values() for y in drawn.y if y is not None]
    axis.set_ylim(min(*values, TARGETS[results.scale]) - 0.1, min(max(values) + 0.1, 8))
    axis.set(xlabel="iteration", ylabel="bits per byte, validation")
    axis.legend(fontsize=8)
    return figure
