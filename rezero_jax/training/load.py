"""Models of runs, restored from their checkpoints: to sample from, to study or to export."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from rezero_jax.errors import UserError
from rezero_jax.models.build import make_language_model
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.runs.files import AnyPath, folder_of
from rezero_jax.runs.folder import read_config, saved_steps
from rezero_jax.runs.restore import Damaged, read, read_newest
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import MakeModel, State, init_state, model_spec
from rezero_jax.training.trainer import Trainer


def load_language_model(workdir: AnyPath) -> tuple[Transformer, int]:
    """The language model of a run, in evaluation mode, and its number of updates.

    The run may still be training, because this function only reads.

    Raises:
      UserError: there is no run or no good checkpoint, or it is of another family or structure.
    """
    config = read_config(workdir)
    if config.model.name != "transformer":
        raise UserError(
            f"{workdir} holds a run of model.name={config.model.name}, which writes no text; "
            "choose a run of a transformer"
        )
    return restored(workdir, config, make_language_model(config.model))  # type: ignore[return-value]


def restored(workdir: AnyPath, config: ConfigDict, make: MakeModel) -> tuple[nnx.Module, int]:
    """A run's newest good checkpoint as the model that `make` constructs.

    Args:
      workdir: the run's folder, which is only read.
      config: the run's config.
      make: the constructor of its model.

    Returns:
      The model in evaluation mode, on one device; its number of updates.

    Raises:
      UserError: there is no good checkpoint, or it is of a model of another structure.
    """
    spec = model_spec(make)
    optimizer, _ = make_optimizer(config.optim, 1, spec)
    device = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(partial(init_state, make, optimizer), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: leaf.update(sharding=device), shapes)
    state = load_state(workdir, shapes)
    model = spec.model(state["params"], state["stats"])
    model.eval()
    return model, int(state["step"])


def load_model(workdir: AnyPath, step: int | None = None) -> tuple[nnx.Module, int, Trainer]:
    """The model of a run of any family, on one device, with the trainer of the run's config.

    The run is only read. Unlike `load_language_model` this function needs the data set.

    Args:
      workdir: the run's folder.
      step: which checkpoint, by default the newest good one; 0 is the initial model.

    Returns:
      The model in evaluation mode; its number of updates; the trainer.

    Raises:
      UserError: there is no run or no such checkpoint, the checkpoint is damaged or of another
        structure, or the data set is missing.
    """
    config = read_config(workdir)
    config.mesh.data = config.mesh.model = 1
    if step != 0:
        check_saved(workdir, step)
    trainer = Trainer(config)
    state = trainer.init() if step == 0 else load_state(workdir, trainer.shapes, step)
    model = trainer.spec.model(state["params"], state["stats"])
    model.eval()
    return model, int(state["step"]), trainer


def load_state(workdir: AnyPath, shapes: Any, step: int | None = None) -> State:
    """The state in a checkpoint of a run, by default the newest good one; moves no damaged ones.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or of a model of another structure.
    """
    check_saved(workdir, step)
    folder = folder_of(workdir) / "checkpoints"
    if step is None:
        if (found := read_newest(folder, shapes)) is None:
            raise UserError(f"{workdir} holds no good checkpoint; train there, or name another run")
        return found[0]
    try:
        return read(folder, step, shapes)[0]
    except Damaged as error:
        raise UserError(
            f"checkpoint {step} in {workdir} is damaged ({error}); choose another one"
        ) from None


def check_saved(workdir: AnyPath, step: int | None = None) -> None:
    """Checks that a run has a checkpoint, or the one of `step`, before anything slow.

    Raises:
      UserError: the checkpoint is missing.
    """
    steps = saved_steps(folder_of(workdir))
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint yet; wait for the first, or train there")
    if step is not None and step not in steps:
        raise UserError(
            f"{workdir} holds no checkpoint {step}; train anew with checkpoint.keep_every_steps"
        )
