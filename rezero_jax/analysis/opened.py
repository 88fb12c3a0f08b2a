"""A run opened for study: the model of a checkpoint, its data, and the logged metrics."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Float
from ml_collections import ConfigDict

from rezero_jax.analysis.propagation import layer_names
from rezero_jax.data import Dataset, Text
from rezero_jax.errors import UserError
from rezero_jax.runs.files import AnyPath
from rezero_jax.runs.reader import Run
from rezero_jax.stack import Stack, split_params
from rezero_jax.training.load import load_model
from rezero_jax.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run with the model of one of its checkpoints, in evaluation mode on one device.

    Attributes:
      model: the model, which may be changed and evaluated again.
      step: number of updates that the model has had.
      log: the run's config as "a.b" -> value, and its logged metrics.
      trainer: everything else that the run's config computes.
    """

    model: nnx.Module
    step: int
    log: Run
    trainer: Trainer

    @property
    def config(self) -> ConfigDict:
        """The config of the run."""
        return self.trainer.config

    def evaluate(self) -> dict[str, float]:
        """Means over the evaluation split, such as {"eval/loss": 0.08} in nats."""
        _, params, stats = split_params(self.model)
        state = {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}
        return self.trainer.evaluate(state)

    def examples(self, count: int) -> Any:
        """The first `count` examples of the evaluation split, arrays as the model takes them."""
        return self.trainer.examples(count)

    def losses(self, model: nnx.Module, batch: Any) -> Float[Array, " batch"]:
        """The training loss (nats) of each example; the argument `loss` of `diagnose`."""
        return self.trainer.losses(model, batch)

    def layers(self) -> dict[str, nnx.Module]:
        """The blocks of every stack by name, such as "layers.3", scanned or not.

        The blocks of a scanned stack are copies: to change its parameters, assign to those of
        `model`, whose leading axis runs over the layers.
        """
        return {
            name: layer
            for path, module in nnx.iter_modules(self.model)
            if isinstance(module, Stack)
            for name, layer in zip(layer_names(path, module), module.layers(), strict=True)
        }

    def frame(self) -> Any:
        """The logged metrics as a `pandas.DataFrame`, a row for each line of metrics.jsonl.

        Raises:
          UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("pandas is not installed; install it, or use `log.lines`") from None
        return pandas.DataFrame(self.log.lines)


def open_run(
    workdir: AnyPath,
    step: int | None = None,
    *,
    data: str | None = None,
    dataset: Dataset | Text | None = None,
    allow: Sequence[str] = (),
) -> OpenRun:
    """Opens a run, which may still be training.

    Args:
      workdir: the run's folder.
      step: the checkpoint, by default the newest good one; 0 is the initial model.
      data: where the run's data set is: data.path of images or text, data.dir of other data.
      dataset: the data set that was passed to `train`, if one was.
      allow: names of the modules that the run's config may import.

    Raises:
      UserError: there is no run or no such checkpoint, the checkpoint is damaged, or the data set
        is missing or differs from the run's.

    Examples:
      >>> run = open_run("runs/digits")
      >>> print(run.step, run.evaluate()["eval/loss"])
    """
    model, step, trainer = load_model(workdir, step, data, dataset, allow)
    return OpenRun(model, step, Run.read(workdir), trainer)
