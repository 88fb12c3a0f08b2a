"""Writes the model of a run to a folder: `python -m rezero_jax.export WORKDIR --out=DIR`.

DIR then has model.safetensors (parameters and running statistics of the newest checkpoint),
config.json (a description of the model) and README.md (a model card). `rezero_jax.load(DIR)` makes
the model from them, anywhere. Both folders may be on any storage, and the data set is not needed.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx

from rezero_jax import command
from rezero_jax.errors import UserError, first_line
from rezero_jax.models.build import make_language_model, make_model
from rezero_jax.models.weights import row_major, variables_of
from rezero_jax.user_code import check_allowed, is_own, own_names

CONFIG, WEIGHTS = "config.json", "model.safetensors"

CARD_TEXT = """\
# {title}

A {model[name]} ({sizes}) with the residual rule `{rule}`, trained by rezero_jax \
(ReZero in JAX and Flax NNX).

- Data: `{config.data.name}`
- Training: {steps:,} updates of batches of {config.train.batch_size}, {config.optim.name}, \
learning rate {config.optim.learning_rate}, seed {config.seed}
- Written by rezero_jax {version}; config.json has all sizes

{metrics}

```python
{usage}
```
"""
TEXT_USAGE = """\
import rezero_jax
from flax import nnx

{load}
prompts = [list(b"a")]  # the bytes to continue
new = model.generate(prompts, max_new_tokens={count}, rngs=nnx.Rngs(0))"""
IMAGE_USAGE = """\
import jax.numpy as jnp
import numpy as np
import rezero_jax

{load}
pixels = np.zeros({shape}, np.uint8)  # replace them with your images
images = (pixels / 255 - np.array({mean})) / np.array({std})
logits = model(jnp.asarray(images{flat}, jnp.float32))  # (1, {data[num_classes]})"""


def load(folder: str | os.PathLike[str], allow: Sequence[str] = ()) -> nnx.Module:
    """The model that `python -m rezero_jax.export` wrote to a folder, in evaluation mode.

    Neither the run nor its data set is needed, and on the same machine the outputs equal those of
    the run's model to the bit. The folder's README.md shows how to call the model.

    Args:
      folder: the folder.
      allow: names of the modules that may be imported for the model, which then run their code and
        get the arguments that the folder's config.json has; by default none.

    Raises:
      UserError: the folder has no exported model, the model is damaged or of another version, or it
        needs a module that is not allowed.
    """
    path = epath.Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            raise UserError(
                f"{folder} has no exported model: there is no {name} in it; write one by python -m "
                f"rezero_jax.export WORKDIR --out={folder}"
            )
    description: dict[str, Any] = {}
    try:
        description = dict(json.loads((path / CONFIG).read_text()))
        check_allowed(description, allow, path / CONFIG)
        digest, make = description["sha256"], constructor(description)
        model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        if own_names(description):  # an error in the user's own code
            raise
        raise UserError(
            f"{path / CONFIG} is broken or of another version of rezero_jax "
            f"({type(error).__name__}: {first_line(error)}); export the run again"
        ) from None
    content = (path / WEIGHTS).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path / WEIGHTS} is damaged; export the run again")
    arrays, variables = safetensors.numpy.load(content), variables_of(model)
    shapes = {name: variable.shape for name, variable in variables.items()}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise UserError(
            f"{path / WEIGHTS} is not of the model that {CONFIG} describes; export the run again"
        )
    for name, variable in variables.items():
        variable.set_value(jnp.asarray(arrays[name], variable.dtype))
    model.eval()
    return model


def constructor(description: Mapping[str, Any]) -> Callable[[nnx.Rngs], nnx.Module]:
    """The constructor of a described model.

    The description has "model", the fields of config.model; and, for a classifier, "data" with the
    "example_shape" and "num_classes" of its data set.
    """
    model = description["model"]
    if "data" not in description:
        return make_language_model(model)
    data = description["data"]
    return make_model(model, tuple(data["example_shape"]), data["num_classes"])[0]


def export(workdir: str, out: str, allow: Sequence[str] = ()) -> None:
    """Writes the model of the run in `workdir` to the folder `out`; `allow` is that of `load`.

    Raises:
      UserError: there is no run or no good checkpoint, or `out` cannot be written.
    """
    from rezero_jax import __version__
    from rezero_jax.runs.files import folder_of, read_json
    from rezero_jax.runs.folder import read_config, read_final
    from rezero_jax.training.load import restored

    config, folder = read_config(workdir, allow), folder_of(out)
    description = {"rezero_jax": __version__, "model": config.model.to_dict()}
    if config.model.name != "transformer":
        data = read_json(folder_of(workdir) / "data.json")
        names = ("name", "example_shape", "num_classes", "classes", "mean", "std")
        if "example_shape" in data:  # not of the user's own language model
            description["data"] = {name: data[name] for name in names}
    model, steps = restored(workdir, config, constructor(description))
    arrays = row_major({name: leaf[...] for name, leaf in variables_of(model).items()})
    content = safetensors.numpy.save(arrays)
    description |= {"steps": steps, "sha256": hashlib.sha256(content).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(content)
        (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        card = _card(config, description, read_final(workdir), folder.name)
        (folder / "README.md").write_text(card)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); choose another folder"
        ) from None
    print(f"wrote the model after {steps:,} updates to {out}; load it by rezero_jax.load({out!r})")


def _card(
    config: Any, description: Mapping[str, Any], final: Mapping[str, Any], folder: str
) -> str:
    model, data, steps = description["model"], description.get("data"), description["steps"]
    metrics = "The run had not ended after these updates, so there are no final metrics."
    if final.get("steps") == steps:
        numbers = {key: value for key, value in final.items() if isinstance(value, int | float)}
        rows = [f"| {key} | {value:.6g} |" for key, value in numbers.items()]
        metrics = "\n".join(["| at the end of the run | |", "| --- | --- |", *rows])
    allow = sorted({name.partition(":")[0] for name in own_names(description).values()})
    options = f", allow={allow}" if allow else ""
    load = f'model = rezero_jax.load("{folder}"{options})'
    if data is None and is_own(model["name"]):  # Nothing is known of how the model is called.
        usage = f"import rezero_jax\n\n{load}"
    elif data is None:
        usage = TEXT_USAGE.format(load=load, count=min(100, model["max_len"] - 1))
    else:
        usage = IMAGE_USAGE.format(
            load=load,
            data=data,
            shape=(1, *data["example_shape"]),
            mean=np.round(data["mean"], 6).tolist(),
            std=np.round(data["std"], 6).tolist(),
            flat=".reshape(len(pixels), -1)" if model["name"] == "mlp" else "",
        )
    rule = model.get("residual", "of the model itself")
    sizes = (f"{key} {model[key]}" for key in ("depth", "width", "heads") if key in model)
    return CARD_TEXT.format(
        model=model,
        config=config,
        title=f"{model['name']}, {rule}, {config.data.name}",
        rule=rule,
        sizes=", ".join(sizes),
        steps=steps,
        version=description["rezero_jax"],
        metrics=metrics,
        usage=usage,
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("python -m rezero_jax.export", __doc__)
    parser.add_argument("workdir", type=command.workdir, metavar="WORKDIR", help="the run's folder")
    text = "folder to write to; made if it is missing"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)
    command.add_allow(parser)
    args = parser.parse_args(argv)
    return command.exit_status("export", lambda: export(args.workdir, args.out, args.allow))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
