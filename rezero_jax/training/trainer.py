"""A config turned into compiled functions on a mesh of devices."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rezero_jax import data, processes
from rezero_jax.data.augment import Augmentation
from rezero_jax.data.order import Order, eval_batches
from rezero_jax.data.split import Dataset, HostBatch, standardise
from rezero_jax.data.text import Text
from rezero_jax.devices import compute_dtype, generator
from rezero_jax.errors import UserError
from rezero_jax.models.build import make_language_model, make_model
from rezero_jax.stack import batch_parts
from rezero_jax.training import sharding, step
from rezero_jax.training.intervals import Intervals
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import MakeModel, State, init_state, model_spec


class Trainer:
    """Everything that a config computes; holds no training state.

    Attributes:
      spec: the model's structure.
      objective: what the model learns, see `step.Objective`.
      intervals: when things are due.
      mesh: the devices.
      shapes: shapes, dtypes and shardings of the training state.
      dataset: what to train and to evaluate on.
      train_step: one update, see `step.make_train_step`.
      jitted_dispatch: the updates of one dispatch under jax.jit; `dispatch` calls it.

    Args:
      config: see rezero_jax.config.base_config; model.dtype "auto" becomes that of the devices.
      dataset: what to train on; of config.data only the augmentation is read.
      devices: of the mesh; by default all that JAX sees.

    Raises:
      UserError: a field of the config is invalid.
    """

    @classmethod
    def from_config(
        cls, config: ConfigDict, devices: Sequence[jax.Device] | None = None
    ) -> "Trainer":
        """The trainer of a config on the data set that it names."""
        load = partial(data.load, config.data, config.seed)
        return cls(config, processes.on_first_then_others(load), devices)

    def __init__(
        self,
        config: ConfigDict,
        dataset: Dataset | Text,
        devices: Sequence[jax.Device] | None = None,
    ):
        available = jax.devices() if devices is None else devices
        platform = available[0].platform
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.model.dtype = compute_dtype(config.model.dtype, platform)
        self.config = config
        train, seed = config.train, config.seed
        self.dataset = dataset
        self._train, self._eval = dataset.train, dataset.eval
        self._order = Order(seed, self._train.size, train.batch_size)
        self.intervals = Intervals.from_config(config, self._train.size)
        if train.accumulate < 1 or train.batch_size % train.accumulate:
            raise UserError(
                f"train.accumulate={train.accumulate} does not divide "
                f"train.batch_size={train.batch_size}; choose one that does"
            )
        make, objective = _task(config.model, dataset)
        self.spec, self.objective = model_spec(make), objective
        # The statistics of a BatchNorm are those of a part, so its size is part of the model.
        fixed = train.accumulate if self.spec.has_stats else 1
        key = "train.batch_size" + (" / train.accumulate" if fixed > 1 else "")
        self.mesh = sharding.make_mesh(
            config.mesh,
            available,
            key,
            train.batch_size // fixed,
        )
        data = batch_parts(self.mesh)
        parts = fixed if fixed > 1 else microbatches(train.accumulate, train.batch_size, data)
        eval_size = -(-config.eval.batch_size // data) * data
        self._eval_batches = eval_batches(self._eval.size, eval_size, config.eval.examples)
        optimizer, schedules = make_optimizer(config.optim, self.intervals.total, self.spec)
        self.train_step = step.make_train_step(
            self.spec,
            objective,
            optimizer,
            parts,
            seed,
            augment(config.data),
            generator(platform),
        )
        updates = step.make_dispatch(self.train_step, self._train.gather, self.spec, schedules)
        eval_step = step.make_eval_step(self.spec, objective, self._eval.gather)

        self._whole = sharding.replicated(self.mesh)
        init = partial(init_state, make, optimizer)
        shapes = jax.eval_shape(init, jax.random.key(0))
        placed = sharding.state_shardings(shapes, self.mesh, self.spec, config.mesh.fully_sharded)
        self.shapes = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, placed)
        self._init = jax.jit(init, out_shardings=placed)
        self.jitted_dispatch = jax.jit(
            _with_stop(updates), donate_argnums=0, out_shardings=(placed, self._whole)
        )
        self._eval_step = jax.jit(eval_step, out_shardings=self._whole)

    @cached_property
    def _resident(self) -> tuple[Any, Any]:
        """The data that stays on every device: to train on, and to evaluate on."""
        train, held = (
            sharding.put(dict(split.resident), self._whole) for split in (self._train, self._eval)
        )
        return train, held

    def init(self, seed: int | None = None) -> State:
        """The state after no updates, born on the mesh; by default of the config's seed."""
        key = jax.random.key(self.config.seed if seed is None else seed)
        with jax.set_mesh(self.mesh):
            return self._init(jax.random.fold_in(key, 2**31))

    def batches(self, first: int) -> Iterator[HostBatch]:
        """This process's part of the batches of the updates from `first`, counted from 0."""
        rows = sharding.own_rows(self.mesh, self.config.train.batch_size)
        return self._train.batches(self._order.indices, first, self.intervals.total, rows)

    def dispatch(
        self, state: State, batches: list[HostBatch], stop: int = 0
    ) -> tuple[State, dict[str, Any]]:
        """Applies one update per batch (1 to train.steps_per_dispatch of them); donates `state`.

        The report, still being computed, is that of `step.make_dispatch`, and under "stop" the
        largest that any process gives, so that all learn of a signal after the same update.
        """
        missing = self.config.train.steps_per_dispatch - len(batches)
        padded = batches + [batches[-1]] * missing
        fetched = {name: np.stack([batch[name] for batch in padded]) for name in batches[0]}
        fetched = sharding.put_rows(
            fetched, sharding.batched(self.mesh, axis=1), 1, self.config.train.batch_size
        )
        count = sharding.put(np.int32(len(batches)), self._whole)
        stops = sharding.put_from_each(stop, self.mesh)
        with jax.set_mesh(self.mesh):
            return self.jitted_dispatch(state, self._resident[0], fetched, count, stops)

    def evaluate(self, state: State) -> dict[str, float]:
        """Means over the evaluation split, each example exactly once: {"eval/loss": ...}.

        They are means over examples, or over the bytes of a text. If `eval.examples` is set, only
        the first so many examples count.
        """
        indices, mask = self._eval_batches
        batched, rows = sharding.batched(self.mesh), sharding.own_rows(self.mesh, mask.shape[1])
        sums = []
        for i, fetched in enumerate(self._eval.batches(indices.__getitem__, 0, len(indices), rows)):
            args = sharding.put_rows((fetched, mask[i][rows]), batched, 0, mask.shape[1])
            with jax.set_mesh(self.mesh):
                sums.append(self._eval_step(state, self._resident[1], *args))
            # Two at once keep the devices busy. With dozens under way, several devices of a CPU may
            # wait for each other for ever: one in a collective, the other for leave to begin.
            jax.block_until_ready(sums[-2:-1])
        totals = {name: math.fsum(float(part[name]) for part in sums) for name in sums[0]}
        count = totals.pop("weight")
        return {f"eval/{name}": total / count for name, total in totals.items()}

    def examples(self, count: int) -> step.Batch:
        """The first `count` examples of the evaluation split, or all there are, as a batch."""
        indices = np.arange(min(count, self._eval.size))
        fetched = sharding.put(self._eval.fetch(indices), self._whole)
        return self._eval.gather(self._resident[1], fetched)


def _with_stop(updates: Callable[..., Any]) -> Callable[..., Any]:
    """The updates, and after them the largest of the `stops` (devices,) in the report."""

    def dispatch(state: State, *args: Any) -> tuple[State, dict[str, Any]]:
        *data, stops = args
        state, report = updates(state, *data)
        # After the updates, by a value of theirs: of collectives that wait for nothing of each
        # other, XLA may start another one on each device of a CPU, and with a thread for each core
        # they would wait for each other for ever.
        return state, report | {"stop": jnp.where(state["step"] < 0, 0, stops).max()}

    return dispatch


def microbatches(accumulate: int, batch_size: int, devices: int) -> int:
    """The parts in which `devices` compute a batch that one device computes in `accumulate`.

    No device computes more examples at once than that one, and the parts are as few as can be.
    """
    rows = batch_size // devices
    return next(n for n in range(1, rows + 1) if rows % n == 0 and n * devices >= accumulate)


def _task(model: ConfigDict, dataset: Dataset | Text) -> tuple[MakeModel, step.Objective]:
    """The constructor of the model, and what it learns from the data."""
    if isinstance(dataset, Text):
        make: MakeModel = make_language_model(model)
        if dataset.length > model.max_len:
            raise UserError(
                f"data.length={dataset.length} is more than model.max_len={model.max_len}; lower "
                "it, or raise model.max_len"
            )
        if dataset.largest >= model.vocab_size:
            raise UserError(
                f'the text "{dataset.name}" has the byte {dataset.largest}, which is not in '
                f"model.vocab_size={model.vocab_size}; set it to 256"
            )
        return make, step.language_modelling
    make, input_shape = make_model(model, dataset.example_shape, dataset.num_classes)
    pixels = partial(standardise, mean=dataset.mean, std=dataset.std)
    return make, step.classification(pixels, input_shape)


def augment(config: ConfigDict) -> step.Augment | None:
    """The augmentation that config.data asks for; None if it asks for nothing."""
    augmentation = Augmentation(
        crop_padding=config.crop_padding,
        flip=config.flip,
        jitter=config.jitter,
        rotation=config.rotation,
    )
    if augmentation == Augmentation():
        return None
    return lambda batch, key: batch | {"image": augmentation(batch["image"], key)}
