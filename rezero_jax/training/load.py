"""The model of a run, as its newest good checkpoint holds it: to sample from, study or train on."""

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
    """The language model of the run in `workdir`, in evaluation mode, and its number of updates.

    Only reads, so that it may look at a run that is still being trained.

    Raises:
      UserError: there is no run or no good checkpoint, or it is of another family or structure.
    """
    config = read_config(workdir)
    if config.model.name != "transformer":
        raise UserError(
            f"{workdir} holds a run of model.name={config.model.name}, which writes no text; "
            "choose one of a transformer"
        )
    return restored(workdir, config, make_language_model(config.model))  # type: ignore[return-value]


def restored(workdir: AnyPath, config: ConfigDict, make: MakeModel) -> tuple[nnx.Module, int]:
    """What `make` makes, as the newest good checkpoint has it, and its number of updates.

    Args:
      workdir: the run's folder, which is only read.
      config: the run's.
      make: the constructor of its model.

    Returns:
      The model in evaluation mode, on one device; its number of updates.

    Raises:
      UserError: there is no good checkpoint, or it is of a model of another structure.
    """
    spec = model_spec(make)
    optimizer, _ = make_optimizer(config.optim, 1, spec)
    here = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(partial(init_state, make, optimizer), jax.random.key(0))
    state = load_state(workdir, jax.tree.map(lambda leaf: leaf.update(sharding=here), shapes))
    model = spec.model(state["params"], state["stats"])
    model.eval()
    return model, int(state["step"])


def load_model(workdir: AnyPath, step: int | None = None) -> tuple[nnx.Module, int, Trainer]:
    """The model of the run in `workdir`, of any family, with what it was trained on.

    Only reads, on one device. Unlike `load_language_model` it needs the data set.

    Args:
      workdir: the run's folder.
      step: which checkpoint, by default the newest good one; 0 is the model as it was born.

    Returns:
      The model in evaluation mode; its number of updates; the trainer of the run's config.

    Raises:
      UserError: there is no run or no such checkpoint, it is damaged or of another structure, or
        the data set is missing.
    """
    config = read_config(workdir)
    config.mesh.data = config.mesh.model = 1
    folder = folder_of(workdir) / "checkpoints"
    if step and not (folder / str(step)).is_dir():
        raise UserError(
            f"{workdir} holds no checkpoint {step}; train anew with checkpoint.keep_every_steps"
        )
    if step is None:
        check_saved(workdir)
    trainer = Trainer.from_config(config)
    if step is None:
        state = load_state(workdir, trainer.shapes)
    elif step == 0:
        state = trainer.init()
    else:
        try:
            state, _ = read(folder, step, trainer.shapes)
        except Damaged as error:
            raise UserError(
                f"checkpoint {step} in {workdir} is damaged ({error}); choose another one"
            ) from None
    model = trainer.spec.model(state["params"], state["stats"])
    model.eval()
    return model, int(state["step"]), trainer


def load_state(workdir: AnyPath, shapes: Any) -> State:
    """The newest good state of a run; warns of damaged ones and leaves them where they are.

    Raises:
      UserError: there is none, or it is of a model of another structure.
    """
    folder = folder_of(workdir) / "checkpoints"
    check_saved(workdir)
    found = read_newest(folder, shapes)
    if found is None:
        raise UserError(f"{workdir} holds no good checkpoint; train there, or name another run")
    return found[0]


def check_saved(workdir: AnyPath) -> None:
    """Checks that a run has a checkpoint, before anything that takes long.

    Raises:
      UserError: it has none.
    """
    if not saved_steps(folder_of(workdir)):
        raise UserError(f"{workdir} holds no checkpoint yet; wait for the first, or train there")
