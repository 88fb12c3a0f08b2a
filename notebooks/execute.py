"""Makes notebooks from their .py files and executes them: `python notebooks/execute.py [NAME ...]`.

Without a name it executes all of them. Identifiers of cells are numbers and times are left out, so
that two executions differ only in their results.

`python notebooks/execute.py --pictures` executes nothing. It writes the pictures of cells with the
tag "gallery", as they are saved in the notebooks, to docs/gallery.
"""

import argparse
import base64
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
GALLERY = FOLDER.parent / "docs" / "gallery"
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
NAMES = (
    "rezero_in_ten_minutes",
    "from_a_config_to_a_result",
    "inside_a_deep_transformer",
    "three_rules_compared",
)


def execute(name: str, folder: Path) -> None:
    """Executes notebooks/NAME.py from top to bottom and writes NAME.ipynb to the folder.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed; nothing is written.
    """
    notebook = jupytext.read(FOLDER / f"{name}.py")
    notebook.metadata |= METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": FOLDER.parent}},  # from which the project can be imported
    ).execute()
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def pictures(name: str) -> dict[str, bytes]:
    """The PNG pictures of the saved notebook's gallery, by file name."""
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    tagged = [cell for cell in cells if "gallery" in cell.metadata.get("tags", ())]
    outputs = [output.get("data", {}) for cell in tagged for output in cell.outputs]
    encoded = [data["image/png"] for data in outputs if "image/png" in data]
    return {f"{name}_{i}.png": base64.b64decode(png) for i, png in enumerate(encoded, 1)}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="default: here")
    text = "write the gallery's pictures instead, from the saved notebooks"
    parser.add_argument("--pictures", action="store_true", help=text)
    args = parser.parse_args()
    for name in args.names or NAMES:
        if args.pictures:
            for file, content in pictures(name).items():
                (GALLERY / file).write_bytes(content)
                print(f"wrote {GALLERY / file}")
            continue
        execute(name, args.out)
        print(f"wrote {args.out / name}.ipynb")


if __name__ == "__main__":
    main()
