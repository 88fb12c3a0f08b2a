"""How runs differ, and when the seeds of each setting reached a target."""

import json
from collections.abc import Sequence

from rezero_jax.runs.folder import TOPOLOGY
from rezero_jax.runs.reader import Run


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: the config fields, other than the seed, in which the runs differ."""
    keys = sorted({key for run in runs for key in run.config} - {"seed"})
    keys = [key for key in keys if not key.startswith(TOPOLOGY)]

    def values(keys: Sequence[str]) -> list[str]:
        return [json.dumps([run.config.get(key) for key in keys]) for run in runs]

    telling = [key for key in keys if len(set(values([key]))) > 1]
    # Lengths and cadences rarely matter to a reader, and settings of the optimizer often follow
    # from the rule; each is shown only if what comes before it does not distinguish the runs.
    recipe = [key for key in telling if key.startswith(("model.", "optim.", "data.name"))]
    model = [key for key in recipe if key.startswith("model.")]
    shared = [key for key in model if all(key in run.config for run in runs)]  # by all families
    kinds = [keys for keys in (shared, model, recipe) if keys]
    kinds = [keys for keys in kinds if len(set(values(keys))) == len(set(values(recipe)))]
    short = kinds[0] if kinds else telling
    return [
        ", ".join(f"{key.split('.')[-1]}={run.config.get(key)}" for key in short)
        or str(run.config.get("model.residual", run.folder.name))
        for run in runs
    ]


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by label; those that differ only in the seed share one."""
    settings: dict[str, list[Run]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        settings.setdefault(label, []).append(run)
    return settings


def times_to(runs: Sequence[Run], metric: str, target: float) -> dict[str, list[float | None]]:
    """`Run.time_to` of each run, under the labels of the settings."""
    return {
        label: [run.time_to(metric, target) for run in seeds]
        for label, seeds in by_label(runs).items()
    }
