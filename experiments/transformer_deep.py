"""Table 3: Transformers of 64 and 128 layers, beside one whose gates are frozen at 0."""

import json
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from experiments import drawing, entropies, transformer12
from experiments.claims import Claim, all_or_none, bounded
from experiments.jobs import CONTROL, FROZEN, TEST, Job
from experiments.results import Results, Row, find, training_curve
from experiments.statistics import paired
from rezero_jax.runs.reader import Run

WARMUP, OPEN = ("optim.warmup_steps=100",), ("model.alpha_init=1.0",)
DEEP: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "Post-Norm, 64 layers": (64, "post_norm", ()),
    "Post-Norm + warm-up, 64 layers": (64, "post_norm", WARMUP),
    "ReZero alpha = 1, 64 layers": (64, "rezero", OPEN),
    "ReZero alpha = 0, 64 layers": (64, "rezero", ()),
    "Pre-Norm, 64 layers": (64, "pre_norm", ()),
    "ReZero alpha = 0, 128 layers": (128, "rezero", ()),
    CONTROL: (64, "rezero", (*FROZEN, "model.depth=1")),
}
NOT_IN_THE_PAPER = "Pre-Norm, 64 layers"
BASELINES = tuple(DEEP)[:3]  # all of which diverged
OURS, DEEPEST = "ReZero alpha = 0, 64 layers", tuple(DEEP)[-2]
SHALLOW = ("Post-Norm + warm-up", "ReZero alpha = 1", "ReZero alpha = 0")
SMOKE = ("eval.examples=16", "eval.batch_size=16")
BITS = "bits per byte"


def job(setting: str, scale: str) -> Job:
    """The run of one of DEEP."""
    layers, rule, overrides = DEEP[setting]
    mark = {WARMUP: "-warmup100", OPEN: "-alpha1", DEEP[CONTROL][2]: "-frozen"}.get(overrides, "")
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
    """The rows of the table; those of 12 layers are transformer12's, at the paper's scale only.

    A smoke test has the ReZero net alone, to save compilation.
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
    make = partial(Row, reduced=scale != "paper")
    rows = []
    for setting, seeds in runs.items():
        tests = tuple(None if run.diverged else _test(run) for run in seeds)
        sizes = tuple(run.final()["parameters"] / 1e6 for run in seeds)
        rows += [
            make(setting, BITS, tests, "alpha = 0" in setting or setting == CONTROL),
            make(setting, "million parameters", sizes),
        ]
    claims = _claims(rows, runs, scale != "paper") if CONTROL in runs else []
    curves = {name: training_curve(seeds, "train/bits_per_byte") for name, seeds in runs.items()}
    levels = entropies.of_run(runs[OURS][0])
    return Results("transformer_deep", scale, rows, claims, curves, levels=levels)


def _claims(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], reduced: bool) -> list[Claim]:
    """Which nets learn, that is, are better than the control."""
    gaps = {
        setting: paired(*(find(rows, name, BITS).draws for name in (setting, CONTROL)))
        for setting in runs
    }
    quantity = f"{BITS} minus those of the net with {CONTROL}"
    judged = partial(bounded, source="UAI 8", quantity=quantity, reduced=reduced)
    claims = [
        judged(f"ReZero trains at {layers} layers", draws=gaps[setting], high=0)
        for layers, setting in ((64, OURS), (128, DEEPEST))
    ]
    for setting in BASELINES:
        text = f"{setting.partition(',')[0]} does not train at 64 layers"
        n, lost = len(runs[setting]), sum(run.diverged for run in runs[setting])
        if lost:
            evidence = f"{lost} of {n} runs diverged"
            claims.append(Claim(text, "UAI 8", all_or_none(lost, n), evidence, n, reduced=reduced))
        else:
            claims.append(judged(text, draws=gaps[setting], low=0))
    return claims


def _test(run: Run) -> float:
    """Bits per byte on the test split, as evaluated at the end."""
    return float(json.loads((run.folder / TEST).read_text())["eval/bits_per_byte"])


def plot(results: Results) -> Figure:
    """Bits per byte of the training batches, smoothed."""
    figure, (axis,) = drawing.sheet_of(results)
    for setting, colour in drawing.colours(results.curves).items():
        drawn = drawing.smoothed(results.curves[setting])
        label = setting.partition(",")[0] if results.scale == "smoke" else setting
        drawing.line(axis, drawn, label if drawn.x else f"{label} (diverged at once)", colour)
    drawing.bits_per_byte(axis, results, "update", "training")
    return figure
