"""The pure functions of training: one update, a dispatch of several, and an evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from rezero_jax.training.state import ModelSpec, State

Batch = dict[str, Array]
# objective(model, batch, key) -> {"loss": (batch,), ...}, one float32 per example. "weight", if
# present, is the weight of each example in an evaluation.
Objective = Callable[[nnx.Module, Batch, Array], dict[str, Array]]
# gather(resident, fetched) -> batch, on the device.
Gather = Callable[[Batch, Batch], Batch]
# Operations whose operands and results a backward pass keeps; XLA computes the rest in its kernels.
KEPT = ("dot_general", "conv_general_dilated", "custom_vjp_call")
# (state, ...) -> (state, report).
Update = Callable[..., tuple[State, dict[str, Array]]]


def make_train_step(
    spec: ModelSpec,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int,
    seed: int,
    augment: Callable[[Batch, Array], Batch] | None = None,
    generator: str = "threefry2x32",
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
) -> Update:
    """One update: (state, batch, measure) -> (state, {"loss", "grad_norm", ...}), float32 scalars.

    "grad_norm" is 0 where the bool `measure` is False: reading every gradient once more costs a
    tenth of the step of a deep narrow network. All randomness of update t is a function of
    fold_in(key(seed), t).

    The microbatches of the augmented batch run one after another, and their gradients are averaged.
    `augment(batch, key)` is random, `generator` implements the keys, see `devices.generator`, and
    `prepare` makes a microbatch what the objective takes.
    """

    def loss(params: Any, stats: Any, batch: Batch, key: Array) -> tuple[Array, tuple]:
        model = spec.model(params, stats)
        values = objective(model, prepare(batch), key)
        means = {name: value.mean() for name, value in values.items()}
        stats = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        return means["loss"], (stats, means)

    grad = jax.grad(loss, has_aux=True)

    def gradients(params: Any, stats: Any, batch: Batch, key: Array) -> tuple[Any, tuple]:
        if microbatches == 1:
            return grad(params, stats, batch, key)

        # A microbatch takes every n-th example, so that each device keeps its own examples.
        batches = jax.tree.map(
            lambda leaf: leaf.reshape(-1, microbatches, *leaf.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(key, microbatches)

        def accumulate(carry: Any, xs: Any) -> tuple[Any, None]:
            stats, total = carry
            grads, (stats, means) = grad(params, stats, *xs)
            return (stats, jax.tree.map(jnp.add, total, (grads, means))), None

        first = jax.tree.map(lambda leaf: leaf[0], batches)
        grads, (_, means) = jax.eval_shape(grad, params, stats, first, key)
        zeros = jax.tree.map(jnp.zeros_like, (grads, means))
        (stats, total), _ = jax.lax.scan(accumulate, (stats, zeros), (batches, keys))
        grads, means = jax.tree.map(lambda leaf: leaf / microbatches, total)
        return grads, (stats, means)

    def train_step(
        state: State, batch: Batch, measure: Array | bool = True
    ) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed, impl=generator), state["step"])
        if augment is not None:
            key, augment_key = jax.random.split(key)
            batch = augment(batch, augment_key)
        grads, (stats, means) = gradients(state["params"], state["stats"], batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        norm = jax.lax.cond(measure, optax.tree.norm, lambda grads: jnp.float32(0), grads)
        return {
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "stats": stats,
            "opt_state": opt_state,
        }, means | {"grad_norm": norm}

    return train_step


def kept_bytes(spec: ModelSpec, objective: Objective, state: State, batch: Any) -> int:
    """Bytes that the backward pass of a whole batch keeps; see `KEPT`.

    `state` and `batch` are shapes; nothing is computed.
    """

    def loss(params: Any, stats: Any, batch: Batch) -> Array:
        return objective(spec.model(params, stats), batch, jax.random.key(0))["loss"].mean()

    def backward(*args: Any) -> Any:
        keep = jax.checkpoint(loss, policy=lambda primitive, *_, **__: primitive.name in KEPT)
        return jax.vjp(keep, *args)[1]

    kept = jax.eval_shape(backward, state["params"], state["stats"], batch)
    results = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return 2 * results  # the operands are about as large, as each is computed from a result


def make_dispatch(
    train_step: Update, gather: Gather, spec: ModelSpec, schedules: dict[str, optax.Schedule]
) -> Update:
    """Up to K updates in one dispatch: (state, resident, fetched, count, stops) -> (state, report).

    `fetched` holds K batches on a leading axis, of which the first `count` are used; `count` is a
    traced number, so one compilation serves all. The report has every metric of `train_step` with
    a leading axis K (zeros beyond `count`); of the last update "grad_norm", "param_norm", "alphas"
    (layers,) and "learning_rate/<group>"; and as "stop" the largest of `stops` (devices,).
    """

    def dispatch(
        state: State, resident: Batch, fetched: Batch, count: Array, stops: Array
    ) -> tuple[State, dict[str, Array]]:
        def batch(i: Any) -> Batch:
            return gather(resident, jax.tree.map(lambda leaf: leaf[i], fetched))

        def body(i: Array, carry: Any) -> Any:
            state, report = carry
            state, metrics = train_step(state, batch(i), i == count - 1)
            report = {name: report[name].at[i].set(value) for name, value in metrics.items()}
            return state, report

        size = jax.tree.leaves(fetched)[0].shape[0]
        _, shapes = jax.eval_shape(train_step, state, jax.eval_shape(batch, 0))
        report = {name: jnp.zeros((size, *s.shape), s.dtype) for name, s in shapes.items()}
        state, report = jax.lax.fori_loop(0, count, body, (state, report))
        last = state["step"] - 1
        rates = {
            f"learning_rate/{name}": jnp.asarray(s(last), jnp.float32)
            for name, s in schedules.items()
        }
        return state, report | rates | {
            "grad_norm": report["grad_norm"][count - 1],
            "param_norm": optax.tree.norm(state["params"]),
            "alphas": spec.alphas(state["params"]),
            # The maximum depends on the updates: XLA may start independent collectives in another
            # order on each device of a CPU, which deadlock where each core has one thread.
            "stop": jnp.where(state["step"] < 0, 0, stops).max(),
        }

    return dispatch


def make_eval_step(
    spec: ModelSpec, objective: Objective, gather: Gather
) -> Callable[..., dict[str, Array]]:
    """eval_step(state, resident, fetched, mask) -> weighted sums over the unmasked examples.

    The result "weight" is the sum of the weights, which are 1 by default.
    """

    def eval_step(state: State, resident: Batch, fetched: Batch, mask: Array) -> dict[str, Array]:
        model = spec.model(state["params"], state["stats"])
        model.eval()
        values = objective(model, gather(resident, fetched), jax.random.key(0))
        weight = values.pop("weight", jnp.ones(mask.shape, jnp.float32))
        sums = {name: jnp.where(mask, value * weight, 0).sum() for name, value in values.items()}
        return sums | {"weight": jnp.where(mask, weight, 0).sum()}

    return eval_step
