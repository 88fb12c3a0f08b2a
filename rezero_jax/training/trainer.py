"""From a config to compiled functions on a mesh of devices."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rezero_jax import data, processes
from rezero_jax.data.augment import augment
from rezero_jax.data.order import Order, eval_batches
from rezero_jax.data.split import Dataset, HostBatch
from rezero_jax.data.text import Text
from rezero_jax.devices import batch_shards, compute_dtype, generator, gpu_memory
from rezero_jax.errors import Diverged, UserError
from rezero_jax.training import sharding, step
from rezero_jax.training.intervals import Intervals
from rezero_jax.training.objective import check_own, make_task
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import ModelSpec, State, init_state, model_spec, state_shapes

Metrics = Callable[[Any, step.Batch, Callable], Mapping[str, Any]]


class Trainer:
    """Everything that a config computes; holds no training state.

    Attributes:
      config: the config, in which model.dtype "auto" is the dtype that suits the devices, and
        data.name is the name of `dataset`.
      dataset: the training and evaluation data.
      spec: the model's structure.
      objective: the loss and the metrics, see `step.Objective`.
      intervals: the steps at which a run logs, evaluates, saves and ends.
      mesh: the devices.
      microbatches: number of microbatches of each batch, the fewest that fit on a known GPU.
      shapes: shapes, dtypes and shardings of the training state.
      train_step: one update, see `step.make_train_step`.
      jitted_dispatch: `step.make_dispatch` under jax.jit; `dispatch` calls it.
      placement: the shardings of its arguments `fetched`, `count` and `stops`.

    Args:
      config: see rezero_jax.config.base_config.
      dataset: replaces the data set of config.data, of which only the augmentation is then read.
      devices: the devices of the mesh; by default all that JAX sees.

    Raises:
      UserError: a field of the config is invalid.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: Dataset | Text | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        if dataset is None:
            load = partial(data.load, config.data, config.seed)
            dataset = processes.on_first_then_others(load)
        devices = devices or jax.devices()
        platform = devices[0].platform
        config = config.copy_and_resolve_references()
        with config.unlocked():
            if "dtype" in config.model:  # The user's own model may have none.
                config.model.dtype = compute_dtype(config.model.dtype, platform)
            config.data.name = dataset.name
        self.config, self.dataset = config, dataset
        self._order = Order(config.seed, dataset.train.size, config.train.batch_size)
        self.intervals = Intervals.from_config(config, dataset.train.size)
        make, self._of_prepared, self._prepare = make_task(config, dataset)
        self.spec = model_spec(make)
        self.mesh, self.microbatches = _mesh(config, self.spec, devices)
        shards = batch_shards(self.mesh)
        eval_size = -(-config.eval.batch_size // shards) * shards
        self._eval_batches = eval_batches(dataset.eval.size, eval_size, config.eval.examples)
        optimizer, schedules = make_optimizer(config.optim, self.intervals.total, self.spec)
        change, bits = augment(config.data), generator(platform)
        self._whole = sharding.replicated(self.mesh)
        self.placement = (
            sharding.batched(self.mesh, axis=1),
            self._whole,
            NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)),
        )
        init = partial(init_state, make, optimizer)
        shapes = state_shapes(make, optimizer)
        placed = sharding.state_shardings(shapes, self.mesh, self.spec, config.mesh.fully_sharded)
        self.shapes = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, placed)
        check_own(config, dataset, self.spec, self.shapes, self.objective)
        self.spec, self.microbatches = self._fastest(change)
        self.train_step = step.make_train_step(
            self.spec,
            self._of_prepared,
            optimizer,
            self.microbatches,
            config.seed,
            change,
            bits,
            self._prepare,
        )
        dispatch = step.make_dispatch(self.train_step, dataset.train.gather, self.spec, schedules)
        eval_step = step.make_eval_step(self.spec, self.objective, dataset.eval.gather)
        options = dict(self.spec.gpu_compiler_options) if platform == "gpu" else None
        self._init = jax.jit(init, out_shardings=placed)
        self.jitted_dispatch = jax.jit(
            dispatch,
            donate_argnums=0,
            out_shardings=(placed, self._whole),
            compiler_options=options,
        )
        self._eval_step = jax.jit(eval_step, out_shardings=self._whole, compiler_options=options)

    def _fastest(self, change: Callable[..., step.Batch] | None) -> tuple[ModelSpec, int]:
        """The model's spec and the number of microbatches that suit the memory of a known GPU.

        That is the fewest microbatches that fit, at most the config's, without rematerialisation if
        it fits. Otherwise the model is the config's.
        """
        memory, train = gpu_memory(self.mesh.devices.flat[0].device_kind), self.dataset.train
        config, most = self.config.copy_and_resolve_references(), self.microbatches
        saves = config.model.get("remat", "none") != "none"
        if memory is None or (most == 1 and not saves):
            return self.spec, most
        fetched = train.fetch(np.zeros(config.train.batch_size, np.int32))
        batch = jax.eval_shape(train.gather, dict(train.resident), fetched)
        if change is not None:
            batch = jax.eval_shape(change, batch, jax.random.key(0))
        shards = batch_shards(self.mesh)
        rows = config.train.batch_size // shards
        free = memory - 2 * sharding.device_bytes(self.shapes)  # the state and its gradients
        counts = [n for n in range(1, most + 1) if rows % n == 0]
        if self.spec.has_stats:  # the size of a microbatch is part of the model
            counts = [most]

        def fewest(spec: ModelSpec) -> int | None:
            with self._context():
                kept = step.kept_bytes(spec, self.objective, self.shapes, batch)
            return next((n for n in counts if kept <= free * shards * n), None)

        if saves:
            with config.unlocked():
                config.model.remat = "none"
            spec = model_spec(make_task(config, self.dataset)[0])
            if (count := fewest(spec)) is not None:
                return spec, count
        return self.spec, fewest(self.spec) or most

    def objective(
        self, model: nnx.Module, batch: step.Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """The loss and the metrics of a batch of the data set, see `step.Objective`."""
        return self._of_prepared(model, self._prepare(batch), key)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """The mesh, and JAX's default of 32 bits: JAX_ENABLE_X64 changes no bit of a run."""
        with jax.enable_x64(False), jax.set_mesh(self.mesh):
            yield

    @cached_property
    def _resident(self) -> list[Any]:
        """The data that stays on every device: for training, and for evaluation."""
        splits = (self.dataset.train, self.dataset.eval)
        return [sharding.put(dict(split.resident), self._whole) for split in splits]

    def init(self, seed: int | None = None) -> State:
        """The state before any update, made on the mesh; by default from the config's seed."""
        key = jax.random.key(self.config.seed if seed is None else seed)
        with self._context():
            return self._init(jax.random.fold_in(key, 2**31))

    def batches(self, first: int) -> Iterator[HostBatch]:
        """This process's rows of the batches of the updates from `first`, counted from 0."""
        rows = sharding.own_rows(self.mesh, self.config.train.batch_size)
        return self.dataset.train.batches(self._order.indices, first, self.intervals.total, rows)

    def dispatch(
        self, state: State, batches: list[HostBatch], stop: int = 0
    ) -> tuple[State, dict[str, Any]]:
        """Applies one update per batch, 1 to train.steps_per_dispatch of them; donates `state`.

        `stop` is the number of a signal that this process received, or 0. All processes find the
        largest in the report, so that they stop after the same update. Returns the state and the
        report of `step.make_dispatch`, which the devices still compute.
        """
        missing = self.config.train.steps_per_dispatch - len(batches)
        padded = batches + [batches[-1]] * missing
        fetched = {name: np.stack([batch[name] for batch in padded]) for name in batches[0]}
        stops = np.full(len(self.mesh.local_devices), stop, np.int32)
        args = sharding.put((fetched, np.int32(len(batches)), stops), self.placement)
        with self._context():
            return self.jitted_dispatch(state, self._resident[0], *args)

    def evaluate(self, state: State) -> dict[str, float]:
        """Means over the evaluation split, each example exactly once: {"eval/loss": ...}.

        The means are over examples, or over the bytes of a text; with eval.examples set, over the
        first `eval.examples` examples. Raises Diverged if a mean is not finite.
        """
        indices, mask = self._eval_batches
        rows = sharding.own_rows(self.mesh, mask.shape[1])
        batches = self.dataset.eval.batches(indices.__getitem__, 0, len(indices), rows)
        sums = []
        for fetched, counted in zip(batches, mask[:, rows], strict=True):
            args = sharding.put((fetched, counted), sharding.batched(self.mesh))
            with self._context():
                sums.append(self._eval_step(state, self._resident[1], *args))
            # Two pending batches keep the devices busy. With dozens, the devices of a CPU can
            # deadlock: one waits in a collective, the other to begin.
            jax.block_until_ready(sums[-2:-1])
        parts = {name: [float(one[name]) for one in sums] for name in sums[0]}
        for name, values in parts.items():
            if not all(map(math.isfinite, values)):
                raise Diverged(
                    f"eval/{name} is not finite after step {int(state['step'])}; lower "
                    "optim.learning_rate or set optim.clip_norm, and start in a new --workdir"
                )
        totals = {name: math.fsum(values) for name, values in parts.items()}
        count = totals.pop("weight")
        return {f"eval/{name}": total / count for name, total in totals.items()}

    def measure(self, state: State, metrics: Metrics) -> dict[str, float]:
        """Metrics of the user's own, {"metric/NAME": value}, of the model in evaluation mode.

        `metrics(model, batch, losses)` returns numbers by name. `batch` has the first 16 examples
        of the evaluation split, and losses(model, batch) is the loss (nats) of each of them. Raises
        a UserError if a value is not a number. Values that are not finite, which JSON cannot hold,
        are left out.
        """
        with jax.set_mesh(self.mesh):
            model = self.spec.model(state["params"], state["stats"])
            model.eval()
            found = metrics(model, self.examples(16), self.losses)
        try:
            values = {f"metric/{name}": float(value) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"eval.metrics returns {found}; return a dict of numbers") from error
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def losses(self, model: nnx.Module, batch: step.Batch) -> jax.Array:
        """The training loss (nats) of each of `examples`, (batch,)."""
        return self._of_prepared(model, batch, jax.random.key(0))["loss"]

    def examples(self, count: int) -> step.Batch:
        """The first `count` examples of the evaluation split, as the model takes them."""
        split = self.dataset.eval
        fetched = sharding.put(split.fetch(np.arange(min(count, split.size))), self._whole)
        return self._prepare(split.gather(self._resident[1], fetched))


def _mesh(config: ConfigDict, spec: ModelSpec, devices: Sequence[jax.Device]) -> tuple[Mesh, int]:
    """The mesh of a config, and the number of microbatches of each batch on it."""
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    if accumulate < 1 or batch_size % accumulate:
        raise UserError(
            f"train.accumulate={accumulate} does not divide train.batch_size={batch_size}; choose "
            "a divisor"
        )
    if spec.has_stats and accumulate > 1:
        # BatchNorm's statistics are those of a microbatch, so its size is part of the model.
        key = "train.batch_size / train.accumulate"
        return sharding.make_mesh(config.mesh, devices, key, batch_size // accumulate), accumulate
    mesh = sharding.make_mesh(config.mesh, devices, "train.batch_size", batch_size)
    return mesh, microbatches(accumulate, batch_size, batch_shards(mesh))


def microbatches(accumulate: int, batch_size: int, devices: int) -> int:
    """The fewest microbatches of a batch that is sharded among `devices` devices.

    No device computes more examples at once than a single device with `accumulate` microbatches.
    """
    rows = batch_size // devices
    return next(n for n in range(1, rows + 1) if rows % n == 0 and n * devices >= accumulate)
