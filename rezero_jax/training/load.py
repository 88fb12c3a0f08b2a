"""Models of runs, restored from their checkpoints: to sample from, to study or to export."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from rezero_jax.config import base_config, check_numbers, override
from rezero_jax.data import Dataset, Text
from rezero_jax.data import load as load_data
from rezero_jax.data.datasets import OF_USERS
from rezero_jax.errors import UserError, foreign
from rezero_jax.models.build import make_language_model
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.runs.files import AnyPath, folder_of, read_json
from rezero_jax.runs.folder import check_data, check_passed, recorded_config, saved_steps
from rezero_jax.runs.restore import Damaged, read, read_newest
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import MakeModel, ModelSpec, State, model_spec, state_shapes
from rezero_jax.training.trainer import Trainer
from rezero_jax.user_code import check_allowed, is_own, own_names


def load_language_model(
    workdir: AnyPath, allow: Sequence[str] = (), step: int | None = None
) -> tuple[Transformer, int]:
    """The language model of a run, in evaluation mode, and its number of updates.

    The run may still be training, because this function only reads. `allow` has the names of the
    modules that the run's config may import, and `step` is the checkpoint, by default the newest.
    Raises a UserError if there is no good checkpoint, or the model has another family or structure.
    """
    config = checked_config(workdir, allow)
    if config.model.name == "transformer" or is_own(config.model.name):
        with foreign(folder_of(workdir) / "config.json", own_names(config)):
            make = make_language_model(config.model)
        model, steps = restored(workdir, config, make, step)
        if isinstance(model, Transformer):
            return model, steps
    raise UserError(f"{workdir} has a run of {config.model.name}, not a transformer; choose one")


def checked_config(
    workdir: AnyPath, allow: Sequence[str] = (), overrides: Iterable[str] = ()
) -> ConfigDict:
    """The config of a run, perhaps a stranger's, with every field checked as on a command line.

    `overrides` "a.b=value" change it. The paths of the data and eval.metrics are unset otherwise.
    Raises a UserError if there is no run, a section or a field is missing, too large or of the
    wrong type, or the config names a module that `allow` lacks.
    """
    path, config = folder_of(workdir) / "config.json", base_config()
    values = read_json(path)
    check_allowed(values, allow, workdir)
    with foreign(path):
        config.update({name: values[name] for name in config})
        config.data.path = config.data.dir = config.eval.metrics = None
        override(config, overrides)
        check_numbers(config)
        str(config.model.name)  # It is read before any model is made.
    return config


def restored(
    workdir: AnyPath, config: ConfigDict, make: MakeModel, step: int | None = None
) -> tuple[nnx.Module, int]:
    """The model of a run on one device, in evaluation mode, and its number of updates.

    `config` and `make` are the config of the run and the constructor of its model; `step` is the
    checkpoint, by default the newest good one. Raises a UserError if there is no good checkpoint,
    or it is of a model of another structure.
    """
    with foreign(folder_of(workdir) / "config.json", own_names(config)):
        spec = model_spec(make)
        optimizer, _ = make_optimizer(config.optim, 1, spec)
        shapes = state_shapes(make, optimizer)
    device = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda leaf: leaf.update(sharding=device), shapes)
    return _model(spec, load_state(workdir, shapes, step))


def load_model(
    workdir: AnyPath,
    step: int | None = None,
    source: str | None = None,
    dataset: Dataset | Text | None = None,
    allow: Sequence[str] = (),
) -> tuple[nnx.Module, int, Trainer]:
    """The model of a run of any family, its number of updates, and the trainer of its config.

    As `restored`, but the data set is needed. The run may be a stranger's: no path that it recorded
    is opened, and nothing is downloaded. Arguments and errors are those of `analysis.open_run`,
    whose `data` is `source`.
    """
    config = checked_config(workdir, allow)
    config.mesh.data = config.mesh.model = 1
    config.data.path = config.data.dir = source
    dataset = dataset or load_dataset(workdir, config)
    with foreign(folder_of(workdir) / "config.json", own_names(config)):
        trainer = Trainer(config, dataset)
    check_data(workdir, trainer.dataset.record())
    return *_model(trainer.spec, state_of(trainer, workdir, step)), trainer


def load_dataset(workdir: AnyPath, config: ConfigDict, flag: str = "data") -> Dataset | Text:
    """The data set of a run, not downloaded; a UserError if its path must be named by --`flag`."""
    check_passed(workdir, False)
    if config.data.name in OF_USERS and not config.data.path:
        recorded = recorded_config(workdir).data.get("path")
        raise UserError(
            f"{workdir} holds a run on data.path={recorded!r}, and a path that a run recorded is "
            f"only used when it is named again; give it as --{flag}=PATH"
        )
    return load_data(config.data, config.seed, download=False)


def state_of(trainer: Trainer, workdir: AnyPath, step: int | None = None) -> State:
    """The state in a checkpoint, by default the newest good one; 0 is the initial state.

    Raises:
      UserError: as `load_state`, or the initial parameters were those of another run.
    """
    if step != 0:
        return load_state(workdir, trainer.shapes, step)
    if source := trainer.config.train.get("init_from"):
        raise UserError(
            f"the run in {workdir} began with the parameters of {source}; choose that one, or a "
            "checkpoint"
        )
    return trainer.init()


def _model(spec: ModelSpec, state: State) -> tuple[nnx.Module, int]:
    model = spec.model(state["params"], state["stats"])
    model.eval()
    return model, int(state["step"])


def load_state(workdir: AnyPath, shapes: Any, step: int | None = None) -> State:
    """The state in a checkpoint of a run, by default the newest good one; moves no damaged ones.

    `shapes` is that of `restore.read`. Raises a UserError if there is no such checkpoint, it is
    damaged, or of a model of another structure.
    """
    folder = folder_of(workdir)
    if step is None:
        if (found := read_newest(folder / "checkpoints", shapes)) is None:
            raise UserError(f"{workdir} holds no good checkpoint; wait for one, or train there")
        return found[0]
    if step not in (steps := saved_steps(folder)):
        held = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(
            f"{workdir} holds no checkpoint {step} (it holds {held}); choose one of these, or set "
            "checkpoint.keep_every_steps"
        )
    try:
        return read(folder / "checkpoints", step, shapes)[0]
    except Damaged as error:
        raise UserError(
            f"checkpoint {step} in {workdir} is damaged ({error}); choose another one"
        ) from None
