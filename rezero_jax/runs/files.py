"""JSON files that are never half written, and a sentence for one that is unreadable."""

import json
import os
from pathlib import Path
from typing import Any

from rezero_jax.errors import UserError, first_line


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file is not a JSON object, or is unreadable.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is broken ({first_line(error)}); restore it from a copy, or choose another "
            "run folder"
        ) from None
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is either the old one or the new one, never half of it."""
    replace_file(path, json.dumps(content, indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader finds the old text or the new, whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
