"""ResNet-110 at initialisation, with two kinds of BatchNorm statistics (protocol.md, E4 D, D2)."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing, spectra
from experiments.jobs import HERE
from experiments.results import Curve, Results
from experiments.spectra import BIN, logs, mode
from experiments.statistics import mapped, paired
from rezero_jax.config import load_config

SEEDS = {"paper": range(1, 11), "cpu": range(1, 11), "smoke": range(1, 3)}  # 0 was known before D
CONFIG = f"{HERE.parent}/configs/resnet.py:recipe=notebook"
NETS = {"vanilla": "residual", "ReZero": "rezero"}
INERT, OF_BATCH = "statistics 0 and 1", "statistics of a batch"
MEAN, LARGEST = "mean of log10", "largest log10"
NEARER = "nearer to 0 with ReZero"  # by how much the mean of log10 is
MEASURES = {
    MEAN: lambda values: logs(values).mean(),
    LARGEST: lambda values: logs(values).max(),
    "mode of log10": lambda values: mode(logs(values)),
}


def measure(results: Results, runs: Any) -> None:
    """The singular values of ten nets each, and the two claims on them."""
    depth = 8 if results.scale == "smoke" else 110
    for name, residual in NETS.items():
        config = (
            f"{HERE.parent}/configs/resnet.py:recipe=notebook,depth={depth},residual={residual}"
        )
        nets = spectra.resnets(load_config(config), SEEDS[results.scale])
        found: dict[str, list[np.ndarray]] = {INERT: [], OF_BATCH: []}
        for net in nets:
            found[INERT].append(spectra.of_images(net))
            found[OF_BATCH].append(spectra.of_images(spectra.with_batch_statistics(net)))
        for kind, values in found.items():
            setting = f"{name}, {kind}"
            results.curves[setting] = Curve(*spectra.histogram(values))
            for metric, of in MEASURES.items():
                results.add(setting, metric, (float(of(one)) for one in values))
    for kind in found:
        before, after = (mapped(abs, results.row(f"{n}, {kind}", MEAN).draws) for n in NETS)
        results.add(f"vanilla, {kind}", NEARER, paired(before, after))
    if results.scale == "smoke":
        return
    text = "The vanilla ResNet-110 multiplies signals by up to 10^8 at initialisation"
    largest = results.row(f"vanilla, {INERT}", LARGEST).draws
    quantity = f"the {LARGEST} with {INERT}, 7 to 9"
    results.bounded(text, "UAI 5", quantity, largest, 7, 9)
    for kind in found:
        text = f"ReZero improves signal propagation in ResNet-110 by about 10^6, with {kind}"
        nearer = results.row(f"vanilla, {kind}", NEARER).draws
        results.bounded(text, "UAI 5", f"{NEARER} is the {MEAN}, 5 to 7", nearer, 5, 7)


def plot(results: Results) -> Figure:
    """A panel for each kind of statistics."""
    figure, axes = drawing.sheet_of(results, 2, height=3.2)
    for axis, kind in zip(axes, (INERT, OF_BATCH), strict=True):
        for name, colour in drawing.colours(NETS).items():
            drawing.histogram(axis, results.curves[f"{name}, {kind}"], BIN, name, colour)
        axis.set(title=kind, xlabel="log10 of the singular values", ylabel="share")
        drawing.legend(axis)
    return figure
