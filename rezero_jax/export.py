"""Writes the model of a run to a folder: `python -m rezero_jax.export WORKDIR --out=DIR`.

DIR then holds model.safetensors (parameters and running statistics of the newest checkpoint),
config.json (what the model is) and README.md (a model card). `rezero_jax.load(DIR)` makes the model
of them, anywhere. Both folders may be on any storage, and the data set is not needed.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rezero_jax.analysis import command


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("rezero_jax.export", __doc__)
    parser.add_argument("workdir", type=command.workdir, metavar="WORKDIR", help="the run's folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to; made if need be")
    args = parser.parse_args(argv)
    return command.exit_status("export", lambda: export(args.workdir, args.out))


def export(workdir: str, out: str) -> None:
    """Writes the model of the run in `workdir` to `out`.

    Raises:
      UserError: there is no run or no good checkpoint, or `out` cannot be written.
    """
    from rezero_jax import __version__
    from rezero_jax.models import exported
    from rezero_jax.runs.files import folder_of
    from rezero_jax.runs.folder import read_config, read_final
    from rezero_jax.training.load import restored

    config, folder = read_config(workdir), folder_of(out).expanduser()
    description = {"rezero_jax": __version__, "model": config.model.to_dict()} | _data(config)
    model, steps = restored(workdir, config, exported.constructor(description))
    description["steps"] = steps
    exported.save(model, description, out)
    card = _card(config, description, read_final(workdir) or {}, folder.name)
    (folder / "README.md").write_text(card)
    print(f"the model after {steps:,} updates is in {out}; load it by rezero_jax.load({out!r})")


def _data(config: Any) -> dict[str, Any]:
    """What a classifier must know of its data set; nothing is read of those from TFDS."""
    from rezero_jax import data

    if config.model.name == "transformer":
        return {}
    dataset: Any = data.stand_in(config.data) or data.load(config.data, config.seed)
    names = ("name", "example_shape", "num_classes", "mean", "std")
    return {"data": {name: getattr(dataset, name) for name in names}}


def _card(
    config: Any, description: Mapping[str, Any], final: Mapping[str, Any], folder: str
) -> str:
    """The model card, Markdown."""
    model, steps = description["model"], description["steps"]
    sizes = ", ".join(f"{key} {model[key]}" for key in ("depth", "width", "heads") if key in model)
    lines = [
        f"# {model['name']}, {model['residual']}, {config.data.name}",
        "",
        f"A {model['name']} ({sizes}) with the residual rule `{model['residual']}`, trained by "
        "rezero_jax (ReZero in JAX and Flax NNX).",
        "",
        f"- Data: `{config.data.name}`",
        f"- Training: {steps:,} updates of batches of {config.train.batch_size}, "
        f"{config.optim.name}, learning rate {config.optim.learning_rate}, seed {config.seed}",
        f"- Written by rezero_jax {description['rezero_jax']}; config.json has all sizes",
        "",
    ]
    if final.get("steps") == steps:
        numbers = {key: value for key, value in final.items() if isinstance(value, int | float)}
        lines += ["| at the end of the run | |", "| --- | --- |"]
        lines += [f"| {key} | {value:.6g} |" for key, value in numbers.items()]
    else:
        lines += ["The run had not ended after these updates, so there are no final metrics."]
    return "\n".join([*lines, "", "```python", *_usage(description, folder), "```", ""])


def _usage(description: Mapping[str, Any], folder: str) -> list[str]:
    """How to load the model and call it, in lines of Python."""
    load = ["import rezero_jax", "", f'model = rezero_jax.load("{folder}")']
    model = description["model"]
    if "data" not in description:
        new = min(100, model["max_len"] - 1)
        return [
            "from flax import nnx",
            *load,
            'prompts = [list(b"a")]  # the bytes to continue',
            f"new = model.generate(prompts, max_new_tokens={new}, rngs=nnx.Rngs(0))",
        ]
    data = description["data"]
    mean, std = ([round(float(x), 6) for x in data[key]] for key in ("mean", "std"))
    flat = ".reshape(len(pixels), -1)" if model["name"] == "mlp" else ""
    return [
        "import jax.numpy as jnp",
        "import numpy as np",
        *load,
        f"pixels = np.zeros((1, {', '.join(map(str, data['example_shape']))}), np.uint8)  # yours",
        f"images = (pixels / 255 - np.array({mean})) / np.array({std})",
        f"logits = model(jnp.asarray(images{flat}, jnp.float32))  # (1, {data['num_classes']})",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
