"""The tables of docs/results.md: claims of the paper and findings of our own (claims.toml)."""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.comparison import Cell, Comparison
from experiments.jobs import HERE
from experiments.published import STATUSES, Claim
from experiments.results import Results, Row
from experiments.statistics import (
    LEVEL,
    NOT_SIGNIFICANT,
    Sample,
    fisher,
    paired,
    quotients,
    verdict,
)
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number

CLAIMS = tomllib.loads((HERE / "claims.toml").read_text())
SIGNIFICANT = "significant"
PAPER = ("claim of the paper", "paper", "ours (95 % interval)", "n", "setting", "verdict")
OWN = ("finding", "effect (95 % interval)", "n", "verdict")
ACROSS = ("one", "other", "bits per byte of the one minus the other's", "n")
Table = Mapping[str, Any]  # of claims.toml


class Found(NamedTuple):
    """All committed results, by experiment and by comparison."""

    results: Mapping[str, Results]
    compared: Mapping[str, Comparison]


def paper_table(found: Found) -> str:
    """Every claim of the paper that claims.toml lists, with our number and the verdict."""
    lines: list[Sequence[str]] = [PAPER]
    for entry in CLAIMS["paper"]:
        claims = [_claim(found, entry["experiment"], start) for start in entry.get("claims", ())]
        weakest = max(map(STATUSES.index, (c.status for c in claims)), default=-1)
        word = f"[{STATUSES[weakest]}](evidence.md#{entry['link']})"
        n = min((claim.n for claim in claims), default=0)
        ours = filled(entry["ours"], found)
        lines.append((entry["claim"], entry["paper"], ours, f"{n:,}", entry["setting"], word))
    return markdown_table(lines)


def own_table(found: Found) -> str:
    """Every finding of our own, with its interval, and the test behind its verdict."""
    return markdown_table([OWN, *(_finding(entry, found) for entry in CLAIMS["own"])])


def _finding(entry: Table, found: Found) -> Sequence[str]:
    kind, effect = entry["kind"], entry["effect"]
    if kind == "claim":
        claim = _claim(found, entry["experiment"], entry["claim"])
        low, high = claim.interval or (math.nan, math.nan)
        shown = f"{number(low)} to {number(high)}"
        return effect, shown, f"{claim.n}", _word(claim.holds is True, entry.get("test", ""))
    if kind == "reached":
        results = found.results[entry["experiment"]]
        one, other = (results.row(entry[side], entry["metric"]) for side in ("one", "other"))
        p = fisher(one, other)
        shown = f"{one.reached} of {len(one.draws)} against {other.reached} of {len(other.draws)}"
        shown += f"; p = {number(p, 2)}"
        return effect, shown, f"{len(one.draws)}", _word(p < LEVEL, "Fisher")
    if kind == "across":
        bits = bits_across(entry, found.compared)
        clear = verdict(bits.interval(), 0) != NOT_SIGNIFICANT
        return effect, bits.shown, f"{len(bits.draws)}", _word(clear, "uncorrected")
    comparison = found.compared[entry["comparison"]]
    if kind == "count":
        counts = _counts(comparison, dunnett=entry["test"] == "Dunnett")
        shown = (
            f"{counts['higher']} of {sum(counts.values())} for ReZero, {counts['lower']} against"
        )
        seeds = max(len(cell.final.draws) for cell in comparison.cells if cell.final)
        return effect, shown, f"{seeds}", _word(True, entry["test"])
    cells = [comparison.of(rule)[0] for rule in entry["rules"]]
    differences = {cell.rule: comparison.difference(cell) for cell in cells}
    known = {rule: difference for rule, difference in differences.items() if difference}
    shown = "; ".join(f"`{rule}` {_bits(one.sample.draws).shown}" for rule, one in known.items())
    clear = all(difference.verdict != NOT_SIGNIFICANT for difference in known.values())
    n = len(next(iter(known.values())).sample.draws)
    return effect, shown, f"{n}", _word(clear, "Bonferroni" if comparison.count > 1 else "")


def _word(significant: bool, test: str) -> str:
    word = SIGNIFICANT if significant else NOT_SIGNIFICANT
    return f"{word} ({test})" if test else word


def _counts(comparison: Comparison, *, dunnett: bool) -> dict[str, int]:
    """How many rules and depths end lower or higher than the control, or not significantly so."""
    words = [word for of_one in comparison.dunnett.values() for word in of_one.values()]
    if not dunnett:
        differences = map(comparison.difference, comparison.cells)
        words = [difference.verdict for difference in differences if difference]
    return {word: words.count(word) for word in ("lower", "higher", NOT_SIGNIFICANT)}


def _claim(found: Found, experiment: str, start: str) -> Claim:
    claims = [c for c in found.results[experiment].claims if c.text.startswith(start)]
    if not claims:
        raise UserError(f"docs/paper/{experiment}.json has no claim {start!r}; see claims.toml")
    return max(claims, key=lambda claim: STATUSES.index(claim.status))  # the weakest part


def _bits(nats: Iterable[Any]) -> Sample:
    return Sample(x if x is None else x / math.log(2) for x in nats)


def filled(text: str, found: Found) -> str:
    """The text of claims.toml with its numbers; raises a UserError if a number is not stored."""

    def value(place: re.Match[str]) -> str:
        name, *rest = place[1].split("|")
        if not rest:
            entries = [*CLAIMS["own"], *CLAIMS["across"]]
            entry = next(entry for entry in entries if entry.get("name") == name)
            return number(abs(bits_across(entry, found.compared).mean or math.nan), 2)
        if unit := re.fullmatch(r"bits|(\d+) nats", rest[-1]):
            cells = found.compared[name].of(rest[0])
            cell = next(c for c in cells if unit[1] in (None, f"{c.depth}"))
            difference = found.compared[name].difference(cell)
            mean = abs(difference.sample.mean or math.nan) if difference else math.nan
            return number(mean if unit[1] else mean / math.log(2), 2)
        row = found.results[name].row(*rest[:2])
        return row.shown if len(rest) == 2 else number(row.mean or math.nan, 3)

    try:
        return re.sub(r"\{([^{}]+)\}", value, text)
    except (StopIteration, KeyError, ValueError) as error:
        raise UserError(f"claims.toml asks for a number that is not stored: {text}") from error


def bits_across(pair: Table, compared: Mapping[str, Comparison]) -> Sample:
    """Bits per byte of the one minus those of the other, for each seed that both have."""
    one, other = _shared(cell.final for cell in _sides(pair, compared))
    return _bits(paired(one, other))


def across(compared: Mapping[str, Comparison]) -> str:
    """A line for each rule of one comparison against a rule of another."""
    lines: list[Sequence[str]] = [
        (*ACROSS, "updates to the target, the other's over the one's"),
    ]
    pairs = [entry for entry in CLAIMS["own"] if entry["kind"] == "across"]
    for pair in (*pairs, *CLAIMS["across"]):
        bits = bits_across(pair, compared)
        names = (f"`{rule}` of `{name}`" for name, rule in (pair["one"], pair["other"]))
        one, other = _shared(cell.to_target for cell in _sides(pair, compared))
        times = Sample(quotients(other, one), log=True).shown
        lines.append((*names, bits.shown, str(len(bits.draws)), times))
    return markdown_table(lines)


def _sides(pair: Table, compared: Mapping[str, Comparison]) -> list[Cell]:
    """The one and the other cell; each comparison has a single depth."""
    return [cell for key in ("one", "other") for cell in compared[pair[key][0]].of(pair[key][1])]


def _shared(rows: Iterable[Row | None]) -> list[tuple]:
    """The draws of two rows for the seeds that both have."""
    draws = [row.draws if row else () for row in rows]
    return [one[: min(map(len, draws))] for one in draws]
