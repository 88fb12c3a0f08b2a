"""Table 3: Transformers of 64 and 128 layers, beside one whose gates stay at 0."""

import json
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from experiments import drawing, entropies, transformer12
from experiments.claims import Claim, bounded, fact, paired
from experiments.jobs import CONTROL, HELD, TEST, Job
from experiments.results import Curve, Results, Row, find
from rezero_jax.runs.reader import Run

TITLE = "Deep Transformers"
SOURCE = "UAI Table 3"
SEEDS = 1
SETTING = {
    "paper": "enwik8, width 256, 512 bytes, batches of 304 (64 layers) and 144 (128), LAMB 0.0005"
    " sqrt(batch), 100 epochs; bits per byte on the test split.",
    "cpu": "Reduced: 64 and 128 layers of the authors' notebook (width 128, 50 times 35 bytes, "
    "Adagrad 0.01), 200 updates, another text; bits per byte on the first 17,500 bytes of the "
    "test split.",
    "smoke": "Reduced: 2 layers of width 16, 20 updates.",
}

WARMUP, OPEN = ("optim.warmup_steps=100",), ("model.alpha_init=1.0",)
DEEP: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "Post-Norm, 64 layers": (64, "post_norm", ()),
    "Post-Norm + warm-up, 64 layers": (64, "post_norm", WARMUP),
    "ReZero alpha = 1, 64 layers": (64, "rezero", OPEN),
    "ReZero alpha = 0, 64 layers": (64, "rezero", ()),
    "Pre-Norm, 64 layers": (64, "pre_norm", ()),
    "ReZero alpha = 0, 128 layers": (128, "rezero", ()),
    CONTROL: (64, "rezero", (*HELD, "model.depth=1")),
}
NOT_IN_THE_PAPER = "Pre-Norm, 64 layers"
RIVALS = tuple(DEEP)[:3]  # all of which diverged
OURS, DEEPEST = "ReZero alpha = 0, 64 layers", tuple(DEEP)[-2]
SHALLOW = ("Post-Norm + warm-up", "ReZero alpha = 1", "ReZero alpha = 0")
SMOKE = ("eval.examples=16", "eval.batch_size=16")
BITS = "bits per byte"
NOTES = (
    "With every alpha held at 0 the net is embedding and head, a model of pairs of bytes, whatever "
    "the depth; the control has one layer. A net learns if it is better than the control.",
    "The paper stops runs after 100 epochs at most and calls three of them diverged.",
)


def job(setting: str, scale: str) -> Job:
    """The run of one of DEEP."""
    layers, rule, overrides = DEEP[setting]
    mark = {WARMUP: "-warmup100", OPEN: "-alpha1", DEEP[CONTROL][2]: "-held"}.get(overrides, "")
    name = f"transformer{layers}-{rule}{mark}"
    if scale == "paper":
        config = f"transformer_enwik8.py:layers={layers},residual={rule}"
    elif scale == "cpu":
        config = f"transformer_notebook.py:layers={layers},steps=200,residual={rule}"
        overrides = (*overrides, "eval.examples=500")
    else:
        config = f"transformer_notebook.py:smoke,steps=20,residual={rule}"
        overrides = (*overrides, *SMOKE)
    return Job(setting, name, config, overrides, test=True)


def runs(scale: str) -> list[Job]:
    """The rows of the table; those of 12 layers are transformer12's and at the paper's scale only.

    In a smoke test the ReZero net alone, as each takes long to compile.
    """
    if scale == "smoke":
        return [job(OURS, scale)]
    if scale == "cpu":
        return [job(setting, scale) for setting in DEEP]
    shallow = [(setting, transformer12.job(setting, scale)) for setting in SHALLOW]
    jobs = [job._replace(setting=f"{setting}, 12 layers") for setting, job in shallow]
    return jobs + [job(setting, scale) for setting in DEEP if setting != NOT_IN_THE_PAPER]


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """Bits per byte on the test split and during training."""
    make = partial(Row, reduced=scale != "paper", missing="diverged")
    rows, curves = [], {}
    for setting, seeds in runs.items():
        tests = tuple(None if run.diverged else _test(run) for run in seeds)
        sizes = tuple(run.final()["parameters"] / 1e6 for run in seeds)
        rows += [
            make(setting, BITS, tests, "alpha = 0" in setting or setting == CONTROL),
            make(setting, "million parameters", sizes),
        ]
        curves[setting] = Curve.of_runs([run.series("train/bits_per_byte") for run in seeds])
    claims = _claims(rows, runs, scale != "paper") if CONTROL in runs else []
    levels = entropies.of_run(runs[OURS][0])
    return Results("transformer_deep", scale, rows, claims, curves, levels=levels)


def _claims(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], reduced: bool) -> list[Claim]:
    """Which nets learn, that is, are better than the control."""
    bits = {setting: find(rows, setting, BITS).ours for setting in runs}
    less = f"{BITS} less those of the net with {CONTROL}"
    judged = partial(bounded, reduced=reduced, seeds=SEEDS)
    claims = [
        judged(f"ReZero trains at {layers} layers", "UAI 8", less, gap, high=0)
        for layers, setting in ((64, OURS), (128, DEEPEST))
        for gap in [paired(bits[setting], bits[CONTROL])]
    ]
    for setting in RIVALS:
        text = f"{setting.partition(',')[0]} does not train at 64 layers"
        lost = sum(run.diverged for run in runs[setting])
        if lost:
            n = len(runs[setting])
            evidence = f"{lost} of {n} runs diverged"
            holds = True if lost == n else None
            claims.append(fact(text, "UAI 8", holds, evidence, n=n, reduced=reduced))
        else:
            gap = paired(bits[setting], bits[CONTROL])
            claims.append(judged(text, "UAI 8", less, gap, low=0))
    return claims


def _test(run: Run) -> float:
    """Bits per byte on the test split, as evaluated at the end."""
    return float(json.loads((run.folder / TEST).read_text())["eval/bits_per_byte"])


def plot(results: Results) -> Figure:
    """Bits per byte of the training batches, smoothed."""
    figure, (axis,) = drawing.sheet(TITLE, results.scale, SETTING[results.scale])
    lowest = []
    for setting, colour in drawing.colours(list(results.curves)).items():
        drawn = drawing.smoothed(results.curves[setting])
        label = setting.partition(",")[0] if results.scale == "smoke" else setting
        label = label if drawn.x else f"{label} (diverged at once)"
        drawing.line(axis, drawn, label, colour)
        lowest += [y for y in drawn.y if y is not None]
    drawing.levels(axis, results.levels)
    lowest += results.levels.values()
    axis.set(xlabel="update", ylabel="bits per byte, training")
    axis.set_ylim(min(lowest) - 0.1, min(max(lowest) + 0.1, 8))
    axis.legend(fontsize=8)
    return figure
