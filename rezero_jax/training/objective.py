"""The model, loss and metrics that a config trains on a data set; any of them may be the user's."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from rezero_jax.data.split import Dataset, standardise
from rezero_jax.data.text import Text
from rezero_jax.errors import UserError
from rezero_jax.models.build import make_language_model, make_model
from rezero_jax.training.state import MakeModel, ModelSpec, State
from rezero_jax.training.step import Batch, Objective
from rezero_jax.user_code import check_call, find, own_names

REPORTED = ("alphas", "grad_norm", "param_norm", "stop")  # see `step.make_dispatch`


def make_task(
    config: ConfigDict, dataset: Dataset | Text
) -> tuple[MakeModel, Objective, Callable[[Batch], Batch]]:
    """The constructor of a model, its objective, and the function that prepares their batches.

    Raises a UserError if a field is invalid, or does not suit the data set.
    """
    model, own = config.model, None
    if name := config.train.get("objective"):
        own = find("train.objective", name)
        check_call(f"train.objective={name!r}", own, "model", "batch", "key")
    if isinstance(dataset, Text):
        make: MakeModel = make_language_model(model)
        length = dataset.train.length
        if length > model.get("max_len", length):
            raise UserError(
                f"data.length={length} exceeds model.max_len={model.max_len}; change one of them"
            )
        if dataset.largest >= model.get("vocab_size", 256):
            raise UserError(
                f"model.vocab_size={model.vocab_size} lacks byte {dataset.largest}; set it to 256"
            )
        return make, own or language_modelling, lambda batch: batch
    make, input_shape = make_model(model, dataset.example_shape, dataset.num_classes)
    standard = partial(standardise, mean=dataset.mean, std=dataset.std)

    def prepare(batch: Batch) -> Batch:
        """The batch with images as the model takes them."""
        images = standard(batch["image"])
        return batch | {"image": images.reshape(images.shape[0], *input_shape)}

    return make, own or partial(cross_entropy, classes=dataset.num_classes), prepare


def cross_entropy(model: Any, batch: Batch, key: Array, *, classes: int) -> dict[str, Array]:
    """Cross entropy (nats) and accuracy of the logits model(batch["image"]) for batch["label"].

    A model that takes `rngs` gets them, for dropout. Raises a UserError unless the logits are
    (batch, classes).
    """
    takes_rngs = "rngs" in inspect.signature(model.__call__).parameters
    logits = model(batch["image"], **({"rngs": nnx.Rngs(dropout=key)} if takes_rngs else {}))
    if jnp.shape(logits) != (wanted := (len(batch["label"]), classes)):
        raise UserError(
            f"the model returns {logits} for {len(batch['label'])} images; it must return logits "
            f"of shape {wanted}, or train.objective must name a loss for what it returns"
        )
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    hits = (logits.argmax(axis=-1) == batch["label"]).astype(jnp.float32)
    return {"loss": losses, "accuracy": hits}


def language_modelling(model: Any, batch: Batch, key: Array) -> dict[str, Array]:
    """Mean cross entropy of an example's targets, in nats ("loss") and in bits per byte.

    With batch["weight"] (batch, length) the mean is over the targets with weight 1, and "weight" of
    an example is the number of these targets.
    """
    if not hasattr(model, "losses"):
        raise UserError(
            f"a {type(model).__name__} has no losses(tokens, targets, rngs=...), (batch, length) "
            "in nats; define it, or name a loss by train.objective"
        )
    losses = model.losses(batch["tokens"], batch["targets"], rngs=nnx.Rngs(dropout=key))
    if "weight" not in batch:
        loss = losses.mean(axis=1)
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}
    counted = batch["weight"].sum(axis=1)
    loss = (losses * batch["weight"]).sum(axis=1) / jnp.maximum(counted, 1)
    return {"loss": loss, "bits_per_byte": loss / math.log(2), "weight": counted}


def check_own(
    config: ConfigDict, dataset: Dataset | Text, spec: ModelSpec, state: State, objective: Objective
) -> None:
    """Checks what the user's own rule, model or objective returns; computes nothing.

    `state` has the shapes of the training state. Errors in the user's code pass unchanged. Raises a
    UserError if the objective does not return one number per example, by name, or the rule or the
    model returns another shape than it should.
    """
    if not (names := own_names(config)):
        return
    split, count = dataset.train, 3

    def evaluate(params: Any, stats: Any, resident: Any, fetched: Any) -> Any:
        batch = split.gather(resident, fetched)
        return objective(spec.model(params, stats), batch, jax.random.key(0))

    fetched = split.fetch(np.arange(count) % split.size)
    arrays = (state["params"], state["stats"], dict(split.resident), fetched)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
    values = jax.eval_shape(evaluate, *shapes)
    key, name = list(names.items())[-1]  # the objective, or the model
    what = f"{key}={name!r}"
    if not isinstance(values, dict) or "loss" not in values:
        raise UserError(f'{what} returns {values}; it must return a dict that has "loss"')
    for key, value in values.items():
        if getattr(value, "shape", None) != (count,):
            raise UserError(
                f"{what} returns {key}={value} for {count} examples; it must return one number per "
                f"example, of shape ({count},)"
            )
        if not isinstance(key, str) or key in REPORTED or key.startswith("learning_rate/"):
            raise UserError(f"{what} returns {key!r}, a name that training reports; rename it")
    if not jnp.issubdtype(values["loss"].dtype, jnp.floating):
        raise UserError(f"{what} returns a loss of {values['loss'].dtype}; return floating point")
