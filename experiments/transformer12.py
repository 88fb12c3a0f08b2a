"""Table 1 of the supplement and Figure 7: how soon six 12-layer Transformers reach a target."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing, entropies
from experiments.claims import Claim, fact, holm, together
from experiments.jobs import Job
from experiments.published import curve, published
from experiments.ratios import Ratio, quotients
from experiments.results import Curve, Results, Row, find, quoted
from rezero_jax.runs.reader import Run

TITLE = "Transformers under six rules: iterations to a target"
SOURCE = "SUP Table 1, UAI Figure 7"
SEEDS = 1
# Bits per byte, on the validation split. That of cpu lies halfway between the bigram and the
# trigram entropy of the standard library, so that a net without layers does not reach it.
TARGETS = {"paper": 1.2, "cpu": 3.0, "smoke": 4.0}
SETTING = {
    "paper": "12 layers, enwik8, width 512, 512 bytes, batches of 1,080, LAMB 0.016; the target "
    "is 1.2 bits per byte, looked for once an epoch (163 iterations).",
    "cpu": "Reduced: 12 layers of width 128, 16 times 128 bytes, 500 iterations of LAMB at "
    "0.002, another text; the target is 3 bits per byte on 32 KiB of validation text, looked for "
    "every 25 iterations.",
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
    "follow from its iterations. With every alpha at 0 the net is embedding and head, a model of "
    "pairs of bytes, which can come as far as the bigram entropy of the text.",
    "In Figure 7 the labels Post-Norm and Pre-Norm do not fit the table and seem to be swapped, so "
    "the two curves are stored under their labels only.",
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
    for baseline in (baseline for baseline in BASELINES if baseline in runs):
        reference = find(rows, baseline, quantity).ours
        for setting in runs:
            speed_up = quotients(reference, find(rows, setting, quantity).ours)
            rows.append(make(setting, f"speed-up over {baseline}", speed_up, is_geometric=True))
    for setting, seeds in runs.items():
        marks = [int(x) for x, _ in curve("transformer12", OURS, "bits per byte after")]
        if scale != "paper":
            marks = [int(x) for x in curves[setting].x]
            marks = marks[len(marks) // 4 - 1 :: max(len(marks) // 4, 1)]
        for mark in marks:
            bits = [_at(_bits(run), mark) for run in seeds]
            rows.append(make(setting, f"bits per byte after {mark} iterations", tuple(bits)))
    claims = _claims(rows, runs, scale != "paper")
    levels = entropies.of_run(runs[OURS][0])
    return Results("transformer12", scale, rows, claims, curves, levels=levels)


def _at(bits: Mapping[float, float], mark: int) -> float | None:
    """The first evaluation at or after an iteration."""
    after = [step for step in bits if step >= mark]
    return bits[min(after)] if after else None


def _claims(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], reduced: bool) -> list[Claim]:
    times = {setting: find(rows, setting, "iterations to the target").ours for setting in runs}
    arrived = [setting for setting in RULES if setting in runs and None not in times[setting]]
    n = len(runs[OURS])
    told = ", ".join(f"{setting} {quoted(times[setting])}" for setting in arrived)
    make = partial(
        fact,
        source="SUP 2",
        evidence=told or "nothing reached the target in all runs",
        n=n,
        reduced=reduced,
        whole=n >= SEEDS,
    )
    theirs = published("transformer12")
    order = sorted(arrived, key=lambda s: theirs[s, "iterations to the target"].value or np.inf)
    rivals = [setting for setting in arrived if setting != OURS]
    claims = [
        make(
            "ReZero with alpha = 0 is the first at the target",
            holds=_all_later([(times[OURS], times[rival]) for rival in rivals])
            if OURS in arrived
            else None,
        ),
        make(
            "Those that arrive do so in the order of the paper's table",
            holds=_all_later([(times[a], times[b]) for a, b in pairwise(order)]),
        ),
    ]
    if "Post-Norm" in runs:
        lost = sum(run.diverged for run in runs["Post-Norm"])
        evidence = f"{lost} of {n} runs diverged"
        holds = True if lost == n else None if lost else False
        claims.append(
            make("Post-Norm without warm-up diverges", holds=holds, evidence=evidence),
        )
    return claims


def _all_later(
    pairs: Sequence[tuple[Sequence[float | None], Sequence[float | None]]],
) -> bool | None:
    """Whether the second times of all pairs are later, by Holm-corrected intervals; None if open.

    False if those of one pair are earlier.
    """
    ratios = [Ratio.of_pairs(later, earlier, [0.0] * len(later)) for earlier, later in pairs]
    tests = holm([ratio.p_value(1.0, 1.0) if ratio else 1.0 for ratio in ratios])
    return together(
        [
            ratio.mean > 1 if ratio and decided else None
            for ratio, (_, decided) in zip(ratios, tests, strict=True)
        ]
    )


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
    axis.axhline(TARGETS[results.scale], color="#888888", lw=0.8, ls=":", label="target")
    drawing.levels(axis, results.levels)
    values = [y for drawn in results.curves.values() for y in drawn.y if y is not None]
    values += [TARGETS[results.scale], *results.levels.values()]
    axis.set_ylim(min(values) - 0.1, min(max(values) + 0.1, 8))
    axis.set(xlabel="iteration", ylabel="bits per byte, validation")
    axis.legend(fontsize=8)
    return figure
