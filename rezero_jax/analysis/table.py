"""A Markdown table that compares runs: `python -m rezero_jax.analysis.table WORKDIR [WORKDIR ...]`.

The table shows the last and best mean training losses of epochs or those of chosen epochs, and the
epochs to target losses, or test accuracies (--accuracy), or bits per byte by step
(--bits_per_byte). A row is a setting, with the mean and range over its seeds.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from rezero_jax import command
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.errors import foreign
from rezero_jax.formatting import markdown, markdown_table, number
from rezero_jax.runs.folder import TOPOLOGY
from rezero_jax.runs.reader import Run

TELLING = ("residual", "name", "depth", "width")  # fields of the model that labels always name
# {metric: (head of a column of values, head of a column of times to a target)}.
HEADS = {
    "loss": ("epoch {}", "epochs to {}"),
    "accuracy": ("epoch {}", "first at {:.0%}"),
    "bits_per_byte": ("step {:,}", "steps to {}"),
}


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs by the config fields in which they differ, except the seed."""
    keys = sorted({key for run in runs for key in run.config} - {"seed"})
    keys = [key for key in keys if key == "data.path" or not key.startswith(TOPOLOGY)]

    def values(keys: Sequence[str]) -> list[str]:
        return [json.dumps([run.config.get(key) for key in keys]) for run in runs]

    differing = [key for key in keys if len(set(values([key]))) > 1]
    # Lengths and intervals rarely matter to a reader.
    recipe = [key for key in differing if key.startswith(("model.", "optim.", "data.name"))]
    chosen = sorted(recipe or differing, key=_telling)
    settings = len(set(values(chosen)))
    for key in chosen[::-1]:  # many fields follow from others, such as from the rule
        if key.startswith("model.") and key.removeprefix("model.") in TELLING:
            break
        fewer = [other for other in chosen if other != key]
        chosen = fewer if fewer and len(set(values(fewer))) == settings else chosen
    found: dict[str, list[Run]] = {}
    for run in runs:
        label = ", ".join(f"{key.partition('.')[2] or key}={run.config.get(key)}" for key in chosen)
        label = label or str(run.config.get("model.residual", run.folder.name))
        found.setdefault(label, []).append(run)
    return found


def _telling(key: str) -> tuple[bool, int, str]:
    """Sorts fields by what they tell a reader: TELLING, others of the model, then the rest."""
    section, _, name = key.partition(".")
    place = TELLING.index(name) if section == "model" and name in TELLING else len(TELLING)
    return section != "model", place, key


def table(
    runs: Sequence[Run],
    after: Sequence[int],
    targets: Sequence[float],
    confidence: float | None = None,
    metric: str = "loss",
) -> str:
    """The Markdown table of values after some epochs or steps, and of times to targets.

    Args:
      after: epochs; for bits per byte, steps. Without any, the last and the best value are shown.
      targets: values of the metric; each has a column of `Run.time_to`.
      confidence: shows `Estimate.interval` beside the mean over seeds; None shows the range.
      metric: "loss" (mean training loss of an epoch, in nats), "accuracy" (of evaluations, in
        percent; targets are fractions) or "bits_per_byte" (of evaluations). For bits per byte, the
        last column is the speed-up of the paper's table (supplement B): the first setting's mean
        steps to the last target, divided by the row's.
    """
    value_head, time_head = HEADS[metric]
    speedup = metric == "bits_per_byte" and bool(targets)
    values_head = map(value_head.format, after) if after else ("last", "best")
    head = ["run", "seeds", *values_head, *map(time_head.format, targets)]
    rows: list[Sequence[object]] = [head + ["speed-up"] * speedup]
    first: Estimate | None = None
    for label, seeds in by_label(runs).items():
        values = [_values(run, metric) for run in seeds]
        best: Callable[..., Any] = max if metric == "accuracy" else min
        columns = [[found.get(x) for found in values] for x in after] or [
            [of([*found.values()] or [None]) for found in values] for of in (itemgetter(-1), best)
        ]
        row = [_cell(column, confidence) for column in columns]
        times: list[float | None] = []
        for target in targets:
            times = [run.time_to(metric, target) for run in seeds]
            row.append(_cell(times, confidence, digits=2 if metric == "loss" else 0))
        if speedup:
            # A single evaluation says nothing about when the target was reached.
            mean = Estimate.of_all(times) if min(map(len, values)) > 1 else None
            first = mean if len(rows) == 1 else first
            row.append(f"{first.mean / mean.mean:.2f}" if first and mean else "")
        rows.append([markdown(label), len(seeds), *row])
    return markdown_table(rows)


def _values(run: Run, metric: str) -> Mapping[float, float]:
    match metric:
        case "loss":
            return dict(enumerate(run.epoch_losses(), 1))
        case "accuracy":
            return {epoch: 100 * a for epoch, a in run.evaluations("eval/accuracy").items()}
    return dict(zip(*run.series("eval/bits_per_byte"), strict=True))


def _cell(values: Sequence[float | None], confidence: float | None, digits: int = 2) -> str:
    def text(value: float) -> str:
        # Small losses need more digits: 0.0021 is not 0.00.
        return number(value, 2) if digits and abs(value) < 0.1 else f"{value:.{digits}f}"

    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"{len(known)} of {len(values)} reached" if known else "not reached"
    mean = text(float(np.mean(known)))
    if len(known) == 1:
        return mean
    if confidence is None:
        return f"{mean} ({text(min(known))}-{text(max(known))})"
    low, high = Estimate.of(known).interval(confidence)
    return f"{mean} [{text(low)}, {text(high)}]"


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("python -m rezero_jax.analysis.table", __doc__)
    parser.add_argument(
        "workdirs", type=command.path, nargs="+", metavar="WORKDIR", help="folders of runs"
    )
    for name, kind, text in (
        ("epochs", int, "epochs after which to show losses or accuracies (default: last and best)"),
        ("steps", int, "steps after which to show bits per byte (default: last and best)"),
        ("targets", float, "losses, accuracies or bits per byte whose time to show"),
    ):
        parser.add_argument(f"--{name}", nargs="*", type=kind, default=[], help=text)
    text = "confidence of Student's interval for the mean over seeds (default: show their range)"
    parser.add_argument("--confidence", type=float, metavar="P", help=text)
    metrics = parser.add_mutually_exclusive_group()
    text = "show test accuracies; targets are fractions, such as 0.7"
    metrics.add_argument("--accuracy", action="store_true", help=text)
    text = "show bits per byte after --steps, and speed-ups over the first run"
    metrics.add_argument("--bits_per_byte", action="store_true", help=text)
    args = parser.parse_args(argv)
    metric = "accuracy" if args.accuracy else "bits_per_byte" if args.bits_per_byte else "loss"
    after = args.steps if args.bits_per_byte else args.epochs

    def work() -> None:
        runs = Run.read_all(args.workdirs)
        with foreign(", ".join(args.workdirs)):
            text = table(runs, after, args.targets, args.confidence, metric)
        print(text)

    return command.exit_status("table", work)


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
