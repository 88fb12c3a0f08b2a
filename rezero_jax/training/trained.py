"""The model of a run, as its newest checkpoint holds it: to sample from, study or train on."""

import json
from functools import partial
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from rezero_jax.errors import UserError
from rezero_jax.models.build import make_language_model
from rezero_jax.models.transformer import Transformer
from rezero_jax.training.checkpoint import first_line
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import init_state, skeleton


def trained_language_model(workdir: str | Path) -> tuple[Transformer, int]:
    """The language model of the run in `workdir`, in evaluation mode, and its number of updates.

    Only reads, so that it may look at a run that is still being trained.

    Raises:
      UserError: there is no run or no checkpoint, it cannot be read, or is of another family.
    """
    folder = Path(workdir).absolute()
    if not (folder / "config.json").exists():
        raise UserError(f"{workdir} holds no run: there is no config.json in it; train there first")
    config = ConfigDict(json.loads((folder / "config.json").read_text()))
    if config.model.name != "transformer":
        raise UserError(
            f"{workdir} holds a run of model.name={config.model.name}, which writes no text; "
            "choose one of a transformer"
        )
    # Orbax writes under another name and renames, so a whole number is a whole checkpoint.
    steps = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint yet; wait for the first, or train there")
    make = make_language_model(config.model)
    structure = skeleton(make)
    optimizer, _ = make_optimizer(config.optim, 1, structure)
    here = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(partial(init_state, make, optimizer), jax.random.key(0)),
    )
    step = max(steps)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            state = checkpointer.restore(folder / "checkpoints" / str(step) / "state", shapes)
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            raise UserError(
                f"checkpoint {step} in {workdir} cannot be read ({first_line(error)}); go "
                "on with the training, which sets it aside"
            ) from error
    model = nnx.merge(structure.graphdef, state["params"], state["stats"])
    model.eval()
    return model, step
