"""The model of a run, as its newest checkpoint holds it: to sample from, study or train on."""

import json
from functools import partial
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from rezero_jax.config import base_config
from rezero_jax.errors import UserError, first_line
from rezero_jax.models.build import make_language_model
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.runs.folder import saved_steps
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import State, init_state, model_spec
from rezero_jax.training.trainer import Trainer


def load_language_model(workdir: str | Path) -> tuple[Transformer, int]:
    """The language model of the run in `workdir`, in evaluation mode, and its number of updates.

    Only reads, so that it may look at a run that is still being trained.

    Raises:
      UserError: there is no run or no checkpoint, it cannot be read, or is of another family.
    """
    config = _config(workdir)
    if config.model.name != "transformer":
        raise UserError(
            f"{workdir} holds a run of model.name={config.model.name}, which writes no text; "
            "choose one of a transformer"
        )
    step = _newest(workdir)
    make = make_language_model(config.model)
    structure = model_spec(make)
    optimizer, _ = make_optimizer(config.optim, 1, structure)
    here = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(partial(init_state, make, optimizer), jax.random.key(0)),
    )
    state = _restore(workdir, step, shapes)
    model = structure.model(state["params"], state["stats"])
    model.eval()
    return model, step  # type: ignore[return-value]


def load_model(workdir: str | Path, step: int | None = None) -> tuple[nnx.Module, int, Trainer]:
    """The model of the run in `workdir`, of any family, with what it was trained on.

    Only reads, on one device. Unlike `load_language_model` it needs the data set.

    Args:
      workdir: the run's folder.
      step: which checkpoint, by default the newest; 0 is the model as it was born.

    Returns:
      The model in evaluation mode; its number of updates; the program of the run's config.

    Raises:
      UserError: there is no run or no such checkpoint, it cannot be read, or its data are not
        there.
    """
    config = _config(workdir)
    step = _newest(workdir) if step is None else step
    if step and not (Path(workdir) / "checkpoints" / str(step)).is_dir():
        raise UserError(
            f"{workdir} holds no checkpoint {step}; train anew with checkpoint.keep_every_steps"
        )
    config.mesh.data = config.mesh.model = 1
    program = Trainer.from_config(config)
    state = _restore(workdir, step, program.shapes) if step else program.init()
    model = program.spec.model(state["params"], state["stats"])
    model.eval()
    return model, step, program


def _config(workdir: str | Path) -> ConfigDict:
    """The run's config; a field that is younger than the run has its default."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run: there is no config.json in it; train there first")
    config = ConfigDict(json.loads(base_config().to_json()))
    with config.ignore_type():
        config.update(json.loads(path.read_text()))
    return config


def _newest(workdir: str | Path) -> int:
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint yet; wait for the first, or train there")
    return steps[-1]


def _restore(workdir: str | Path, step: int, shapes: State) -> State:
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            folder = Path(workdir).absolute() / "checkpoints" / str(step) / "state"
            return checkpointer.restore(folder, shapes)
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            raise UserError(
                f"checkpoint {step} in {workdir} cannot be read ({first_line(error)}); go "
                "on with the training, which sets it aside"
            ) from error
