"""Numbers, durations, paths in a pytree and tables as text."""

import datetime
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from rezero_jax.errors import printable


def number(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits, and with all digits before the point."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if abs(float(text)) >= 1000 or "e" in text else text


def duration(seconds: float) -> str:
    """Seconds as "3 days, 4:05:06"."""
    return str(datetime.timedelta(seconds=round(seconds)))


def markdown(text: object) -> str:
    """A foreign text as it is in Markdown: `printable`, and without links, HTML and emphasis."""
    return re.sub(r"[\\`*<>\[\]]|:(?=//)", r"\\\g<0>", printable(text))


def path_text(path: Any) -> str:
    """The path of a leaf in a pytree, such as "params/head/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def markdown_table(rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [[printable(cell).replace("|", r"\|") for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
