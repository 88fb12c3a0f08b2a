"""Models in folders: `save`, `load`, and for runs `python -m rezero_jax.export WORKDIR --out=DIR`.

A folder has model.safetensors (parameters and running statistics), config.json (the arguments that
make the model) and README.md (a model card). `rezero_jax.load(DIR)` makes the model from them,
anywhere. Folders may be on any storage. To export a run, its data set is not needed.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx

from rezero_jax import command
from rezero_jax.errors import UserError, check_choice, foreign, printable
from rezero_jax.formatting import markdown, markdown_table
from rezero_jax.models.build import check_options, make_language_model, make_model, rule_named
from rezero_jax.models.weights import is_file, open_tensors, row_major, variables_of
from rezero_jax.runs.files import AnyPath, folder_of, read_json
from rezero_jax.runs.moving import STAGED, replace_folder
from rezero_jax.user_code import check_allowed, is_own, own_names

FILES = CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
MODELS = (
    *("MLP", "ResNet.cifar", "ResNet.preact", "Transformer", "ViT"),
    *("Encoder", "EncoderLayer", "Decoder", "DecoderLayer"),
)

CARD_TEXT = """\
# {title}

A {name} of rezero_jax {version} (ReZero in JAX and Flax NNX); config.json has all arguments of its
constructor.

{facts}

```python
{usage}
```
"""
USAGE = """\
import rezero_jax

{load}  # in evaluation mode"""
TEXT_USAGE = """\
import rezero_jax
from flax import nnx

{load}
prompts = [[0]]  # the tokens to continue: in a model of bytes, such as list(b"a")
new = model.generate(prompts, max_new_tokens={count}, rngs=nnx.Rngs(0))"""
IMAGE_USAGE = """\
import jax.numpy as jnp
import numpy as np
import rezero_jax

{load}
pixels = np.zeros({shape}, np.uint8)  # replace them with your images
images = (pixels / 255 - np.array({mean})) / np.array({std})
logits = model(jnp.asarray(images{flat}, jnp.float32))  # (1, {data[num_classes]})"""


def load(folder: AnyPath, allow: Sequence[str] = ()) -> nnx.Module:
    """The model in a folder that `save` or `python -m rezero_jax.export` wrote, for evaluation.

    On the same machine, the outputs equal those of the saved model to the bit. The folder's
    README.md shows how to call the model.

    Args:
      allow: names of the modules that may be imported for the model, which then run their code and
        get the arguments that the folder's config.json has; by default none.

    Raises:
      UserError: the folder has no exported model, the model is damaged or of another version, or it
        needs a module that is not allowed.

    Examples:
      >>> model = load("models/mlp")
      >>> assert model(jnp.ones((8, 64))).shape == (8, 10)
    """
    path = epath.Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not is_file(path / name):
            raise UserError(
                f"{folder} has no exported model: there is no {name} in it; write one by python -m "
                f"rezero_jax.export WORKDIR --out={folder}, or by rezero_jax.save"
            )
    description = read_json(path / CONFIG)
    check_allowed(description, allow, path / CONFIG)
    with foreign(path / CONFIG, own_names(description)):
        digest, make = description["sha256"], constructor(description)
        model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    variables = variables_of(model)
    with open_tensors(path / WEIGHTS) as (weights, file):
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if shapes != {name: variable.shape for name, variable in variables.items()}:
            raise UserError(f"{path / WEIGHTS} is not of the model in {CONFIG}; export it again")
        with weights.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                raise UserError(f"{path / WEIGHTS} is damaged; export the model again")
        for name, variable in variables.items():
            variable.set_value(jnp.asarray(file.get_tensor(name), variable.dtype))
    model.eval()
    return model


def constructor(description: Mapping[str, Any]) -> Callable[[nnx.Rngs], nnx.Module]:
    """The constructor of the model in a config.json, which is one of MODELS or the user's own.

    "model" has its name and arguments. For a user's own classifier, "data" has the "example_shape"
    and the "num_classes" of its data set. Raises a UserError for an unknown or too large model.
    """
    import rezero_jax

    arguments, data = dict(description["model"]), description.get("data")
    if is_own(name := arguments.pop("name")):
        return _of_config(description["model"], data)
    check_choice("model", name, MODELS)
    check_options(arguments)
    if is_own(arguments.get("residual")):
        arguments["residual"] = rule_named(arguments["residual"])
    make: Any = functools.reduce(getattr, name.split("."), rezero_jax)
    return lambda rngs: make(**arguments, rngs=rngs)


def _of_config(model: Any, data: Mapping[str, Any] | None) -> Callable[[nnx.Rngs], nnx.Module]:
    """The constructor of the model of a config.model, a classifier if there are `data`."""
    if data is None:
        return make_language_model(model)
    return make_model(model, tuple(data["example_shape"]), data["num_classes"])[0]


def save(model: nnx.Module, folder: AnyPath) -> None:
    """Writes a model of this package to a folder, from which `load` makes it again, to the bit.

    The model is one of MODELS, from a run or not. The folder may be missing, empty, or an exported
    model, which is replaced in one step: readers, and a process that is killed, find the old or the
    new one. In a bucket, or where the system cannot exchange folders (the current folder, a mount
    point), the files are replaced one after another, and `load` refuses a mixture.

    Raises:
      UserError: the model is of another class or was changed after it was made; or the folder has
        other files, or cannot be written.

    Examples:
      >>> save(MLP(64, width=32, depth=4, out_features=10, rngs=nnx.Rngs(0)), "models/mlp")
    """
    _save(model, folder, None, {}, {})


def export(workdir: str, out: str, allow: Sequence[str] = (), step: int | None = None) -> None:
    """Writes the model of the run in `workdir` to the folder `out`; `allow` is that of `load`.

    Raises:
      UserError: there is no run or no good checkpoint, or as `save`.
    """
    from rezero_jax.runs.folder import read_final
    from rezero_jax.training.load import checked_config, restored

    _check_out(out)
    config, folder = checked_config(workdir, allow), folder_of(workdir)
    recorded, data, images = read_json(folder / "dataset.json"), {}, {}
    with foreign(folder / "dataset.json", own_names(config)):
        if "example_shape" in recorded:  # not of a language model
            kinds: dict[str, type] = {"example_shape": int, "mean": float, "std": float}
            lists = {key: [kind(n) for n in recorded[key]] for key, kind in kinds.items()}
            names = ("name", "num_classes", "classes")
            data["data"] = lists | {name: recorded[name] for name in names}
            images["training images"] = recorded["train"]["examples"]
            images["classes"] = ", ".join(recorded["classes"])[:500]
        make = _of_config(config.model, data.get("data"))
    model, steps = restored(workdir, config, make, step)
    facts = {
        "data": recorded.get("name"),
        **images,
        "updates": f"{steps:,}",
        "batch size": config.train.batch_size,
        "optimizer": config.optim.name,
        "learning rate": config.optim.learning_rate,
        "seed": config.seed,
    }
    with foreign(folder / "final.json"):
        if (final := read_final(workdir)).get("steps") == steps:
            numbers = {key: value for key, value in final.items() if isinstance(value, int | float)}
            facts |= {key: f"{value:.6g}" for key, value in numbers.items()}
    own = config.model.to_dict() if is_own(config.model.name) else None
    _save(model, out, own, data | {"steps": steps}, facts)
    print(
        f"wrote the model after {steps:,} updates to {printable(out)}; load it by "
        f"rezero_jax.load({out!r})"
    )


def _save(
    model: nnx.Module,
    out: AnyPath,
    arguments: dict[str, Any] | None,
    more: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Writes a model made with `arguments`, by default those that the model has kept.

    `more` is for config.json, and `facts` are for the table of the card.
    """
    from rezero_jax import __version__

    _check_out(out)
    arguments, folder = arguments or _arguments(model), folder_of(out)
    arrays = row_major({name: leaf[...] for name, leaf in variables_of(model).items()})
    content = safetensors.numpy.save(arrays)
    digest = {"sha256": hashlib.sha256(content).hexdigest()}
    description = {"rezero_jax": __version__, "model": arguments, **more, **digest}
    keys = ("residual", "depth", "width", "heads")
    facts = {key: arguments[key] for key in keys if key in arguments} | facts
    title = (arguments["name"], facts.get("residual"), facts.get("data"))
    card = CARD_TEXT.format(
        title=markdown(", ".join(str(part) for part in title if part is not None)),
        name=markdown(arguments["name"]),
        version=__version__,
        facts=markdown_table([("", ""), *((markdown(k), markdown(v)) for k, v in facts.items())]),
        usage=_usage(description, folder.name),
    )
    text = json.dumps(description, indent=2) + "\n"
    files = {WEIGHTS: content, CONFIG: text.encode(), CARD: card.encode()}
    try:
        replace_folder(folder, files)
    except OSError as error:
        raise _unwritable(out, error) from error


def _arguments(model: nnx.Module) -> dict[str, Any]:
    """The name and the arguments of the constructor that made a model of this structure."""
    kind, made_by = type(model).__name__, getattr(model, "made_by", None)
    arguments = json.loads(made_by) if made_by else {}
    advice = "or save only its arrays, with rezero_jax.models.weights.save_tensors"
    if arguments.get("name") not in MODELS:
        raise UserError(
            f"this {kind} was not made from numbers and names alone; save one of "
            f"{', '.join(MODELS)}, {advice}"
        )
    make, structures = constructor({"model": arguments}), []
    for one in (nnx.clone(model), nnx.eval_shape(lambda: make(nnx.Rngs(0)))):
        one.eval()
        graph, state = nnx.split(one)
        structures.append((graph, jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)))
    if structures[0] != structures[1]:
        raise UserError(f"this {kind} was changed after it was made; make one like it, {advice}")
    return arguments


def _usage(description: Mapping[str, Any], folder: str) -> str:
    """Python that loads the model from its folder and calls it."""
    model, data = description["model"], description.get("data")
    allow = sorted({name.partition(":")[0] for name in own_names(description).values()})
    load = f"model = rezero_jax.load({folder!a}{f', allow={allow}' if allow else ''})"
    if data is not None:
        return IMAGE_USAGE.format(
            load=load,
            data=data,
            shape=(1, *data["example_shape"]),
            mean=np.round(data["mean"], 6).tolist(),
            std=np.round(data["std"], 6).tolist(),
            flat=".reshape(len(pixels), -1)" if model["name"] == "MLP" else "",
        )
    usage = TEXT_USAGE if model["name"] == "Transformer" else USAGE
    return usage.format(load=load, count=min(100, model.get("max_len", 1) - 1))


def _check_out(out: AnyPath) -> None:
    """Raises a UserError if a folder has, or may have, other files than those of an export."""
    if not os.fspath(out):
        raise UserError("the name of the folder to write to is empty; name a folder")
    folder = folder_of(out)
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise _unwritable(out, error) from error
    others = [name for name in names if name not in FILES and not STAGED.fullmatch(name)]
    is_export = not names
    with contextlib.suppress(UserError):
        is_export = is_export or {"rezero_jax", "sha256"} <= read_json(folder / CONFIG).keys()
    if others or not is_export:
        raise UserError(f"{out} has other files ({', '.join((others or names)[:3])}); name another")


def _unwritable(out: AnyPath, error: OSError) -> UserError:
    return UserError(f"{out} cannot be written ({error.strerror}); choose another folder")


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("python -m rezero_jax.export", __doc__)
    parser.add_argument("workdir", type=command.path, metavar="WORKDIR", help="the run's folder")
    text = "folder to write to: new, empty, or an older export"
    parser.add_argument("--out", type=command.path, required=True, metavar="DIR", help=text)
    text = "checkpoint (default: the newest one)"
    parser.add_argument("--step", type=int, metavar="N", help=text)
    command.add_allow(parser)
    args = vars(parser.parse_args(argv))
    return command.exit_status("export", lambda: export(**args))


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
