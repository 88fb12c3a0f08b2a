"""Table 3: Transformers of 64 and 128 layers, beside one whose gates are frozen at 0."""

import json

from matplotlib.figure import Figure

from experiments import drawing, entropies
from experiments.jobs import CONTROL, TEST
from experiments.results import Curve, Results, Runs
from rezero_jax.runs.reader import Run

OURS, DEEPEST = "ReZero alpha = 0, 64 layers", "ReZero alpha = 0, 128 layers"
PRE_NORM = "Pre-Norm, 64 layers"
BASELINES = (  # all of which diverged in the paper
    *("Post-Norm, 64 layers", "Post-Norm + warm-up, 64 layers"),
    "ReZero alpha = 1, 64 layers",
)
BITS = "bits per byte"


def measure(results: Results, runs: Runs) -> None:
    """Bits per byte on the test split and during training, and which nets learn."""
    for setting, seeds in runs.items():
        tests = (None if run.diverged else _test(run) for run in seeds)
        results.add(setting, BITS, tests)
        sizes = (run.final()["parameters"] / 1e6 for run in seeds)
        results.add(setting, "million parameters", sizes)
        results.curves[setting] = Curve.logged(seeds, "train/bits_per_byte")
    results.levels = entropies.of_run(runs[OURS][0].folder)
    if CONTROL in runs:
        _judge(results, runs)


def _judge(results: Results, runs: Runs) -> None:
    """Which nets learn, that is, are better than the control."""
    quantity = f"{BITS} minus those of the net with {CONTROL}"
    for layers, setting in ((64, OURS), (128, DEEPEST)):
        if setting not in runs:
            continue
        gaps = results.differences(BITS, setting, CONTROL)
        results.bounded(f"ReZero trains at {layers} layers", "UAI 8", quantity, gaps, high=0)
    if PRE_NORM in runs:
        gaps = results.differences(BITS, OURS, PRE_NORM)
        text = "ReZero ends lower than pre-norm at 64 layers"
        results.bounded(text, "", f"{BITS} minus those of pre-norm", gaps, high=0, reduced=False)
    for setting in BASELINES:
        text = f"{setting.partition(',')[0]} does not train at 64 layers"
        n, lost = len(runs[setting]), sum(run.diverged for run in runs[setting])
        if lost:
            results.counted(text, "UAI 8", f"{lost} of {n} runs diverged", lost, n)
        else:
            gaps = results.differences(BITS, setting, CONTROL)
            results.bounded(text, "UAI 8", quantity, gaps, low=0)


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
