"""The tables of the campaign."""

from collections.abc import Sequence

from rezero_jax.formatting import markdown_table
from tests.faults import damage, kill
from tests.faults.runs import Family

Run = kill.KilledRun | damage.DamagedRun


def kill_table(families: Sequence[Family], results: Sequence[Run]) -> str:
    """How many kills of each family struck when, and what they cost."""
    columns = [
        "family",
        "runs",
        "kills",
        *kill.PHASES,
        "most steps lost",
        "a save each",
        "same bits",
    ]
    rows = []
    for family in families:
        runs = [r for r in results if isinstance(r, kill.KilledRun) and r.family == family.name]
        kills = [k for run in runs for k in run.kills]
        lost = [k.lost for k in kills if k.lost is not None]
        rows.append(
            [
                family.name,
                len(runs),
                len(kills),
                *(sum(k.phase == phase for k in kills) for phase in kill.PHASES),
                max(lost, default=0),
                family.save_every,
                f"{sum(not run.problems for run in runs)}/{len(runs)}",
            ]
        )
    return markdown_table([columns, *rows])


def damage_table(results: Sequence[Run]) -> str:
    """What became of the damaged checkpoints, by kind."""
    damaged = [result for result in results if isinstance(result, damage.DamagedRun)]
    names = map(damage.name_of, damage.KINDS)
    groups = [(name, [d for d in damaged if d.kind == name]) for name in names]
    rows = [
        [
            name,
            len(group),
            *(sum(d.outcome == outcome for d in group) for outcome in damage.OUTCOMES),
            f"{sum(not d.problems for d in group)}/{len(group)}",
        ]
        for name, group in [*groups, ("all", damaged)]
    ]
    return markdown_table([["damage", "checkpoints", *damage.OUTCOMES, "same bits"], *rows])
