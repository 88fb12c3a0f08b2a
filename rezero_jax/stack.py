"""Equal blocks as one module: parameters stacked on a leading layer axis and run by a scan.

One compiled block serves every layer, so the time to compile does not grow with depth.
"""

import operator
from collections.abc import Callable
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import spmd
from jax import Array
from jax.sharding import PartitionSpec

from rezero_jax import devices
from rezero_jax.errors import UserError, check_choice, check_sizes
from rezero_jax.residual import Constant

LayerState = tuple[nnx.State, nnx.State, Array | None]  # parameters, other arrays, random key
Layer = Callable[[Array, LayerState], tuple[Array, nnx.State]]

LAYER_AXIS = {nnx.PARTITION_NAME: None}
CHANGES = nnx.Not(nnx.Any(nnx.Param, Constant))  # variables that a call of a block may change

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nnx.Module):
    """`depth` blocks of one shape, applied one after another.

    len(stack) is the depth and stack[i] is block i, counted from 0 or from the end; of a scanned
    stack, a copy with slices of the arrays. Partition names get a None for the layer axis.

    Args:
      make_block: `make_block(rngs)` returns a block, a module that maps x to the same shape. A
        parameter that a block uses twice remains one parameter in every layer.
      depth: number of blocks, at least 1.
      numbered: whether to call `make_block(rngs, layer)` with the block's number, int32 (),
        1 .. depth, on which its initial values and variables may depend.
      scan: True stacks the blocks' parameters on a leading axis of size `depth` and scans over it;
        False keeps a list of blocks, which compiles `depth` times the code but lets the compiler
        optimise across blocks. Both start from the same parameters for the same `rngs`.
      remat: what the backward pass rematerialises: "none"; "full", each block from its input; or
        "dots", everything except matrix products.
      unroll: most blocks in one iteration of the scan, on an accelerator. Slicing the stacks, once
        in an iteration, costs as much time as a small block.
      gpu_unroll: `unroll` on a GPU, where small kernels take as long as their launches; by default
        the same.
      gpu_chain: whether a GPU computes the gradients of the parameters of all layers at once, which
        launches half as many kernels, but stores x and its gradient for every layer and excludes
        jax.jvp. It has no effect under remat, with dropout or with further arguments.

    Raises:
      UserError: depth below 1, or an unknown remat policy.

    Examples:
      >>> stack = Stack(lambda rngs: ReZero(nnx.Linear(8, 8, rngs=rngs)), 500, rngs=nnx.Rngs(0))
      >>> assert (len(stack), stack(jnp.ones((2, 8))).shape) == (500, (2, 8))
    """

    def __init__(
        self,
        make_block: Callable[..., nnx.Module],
        depth: SupportsIndex,
        *,
        numbered: bool = False,
        scan: bool = True,
        remat: str = "none",
        unroll: int = 1,
        gpu_unroll: int | None = None,
        gpu_chain: bool = False,
        rngs: nnx.Rngs,
    ):
        check_sizes(depth=depth)
        depth = operator.index(depth)
        check_choice("remat policy", remat, REMAT_POLICIES)
        self.depth, self.remat = depth, remat
        self.unroll, self.gpu_unroll = unroll, gpu_unroll or unroll
        self.gpu_chain = gpu_chain and remat == "none"
        graphdefs: list[nnx.GraphDef] = []

        def make_state(given: tuple[Any, ...]) -> nnx.State:
            graphdef, state = nnx.split(make_block(*given))
            graphdefs.append(graphdef)
            return state

        # Initialise one layer at a time; vmap would materialise every layer's random bits.
        numbers = (jnp.arange(1, depth + 1, dtype=jnp.int32),) if numbered else ()
        states = jax.lax.map(make_state, (rngs.split(depth), *numbers))
        spmd.add_axis(states, 0, LAYER_AXIS)
        self.blocks: nnx.Module | nnx.List = nnx.merge(graphdefs[0], states)
        if not scan:
            self.blocks = nnx.List(self.layers())

    def __call__(self, x: Array, *args: Any, rngs: nnx.Rngs | None = None, **kwargs: Any) -> Array:
        """Applies the blocks in order to x, each with these arguments.

        If `rngs` is given, every block gets `rngs=` of its own, from the stream "dropout".
        """
        keys = None if rngs is None else jax.random.split(rngs.dropout(), self.depth)
        if isinstance(self.blocks, nnx.List):
            for i, block in enumerate(self.blocks):
                layer, arrays = self._functional(block, args, kwargs, in_loop=False)
                x, updated = layer(x, (*arrays, None if keys is None else keys[i]))
                nnx.update(block, updated)
        else:
            # A divisor of the depth: remaining layers would be split off and joined again.
            platform = devices.target().platform
            most = {"cpu": 1, "gpu": self.gpu_unroll}.get(platform, self.unroll)
            unroll = max(n for n in range(1, most + 1) if self.depth % n == 0)
            layer, arrays = self._functional(self.blocks, args, kwargs, in_loop=unroll < self.depth)
            is_bare = keys is None and not (args or kwargs)
            is_chained = self.gpu_chain and platform == "gpu" and is_bare
            run: Callable[..., Any] = _chain if is_chained else jax.lax.scan
            x, updated = run(layer, x, (*arrays, keys), unroll=unroll)
            nnx.update(self.blocks, updated)
        return x

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, i: SupportsIndex | slice) -> Any:
        which = range(self.depth)[i]  # an IndexError if the stack has no such block
        if isinstance(which, range):
            return [self[n] for n in which]
        if isinstance(self.blocks, nnx.List):
            return self.blocks[which]
        # Split first: a map over the module would copy a parameter that has two places.
        graphdef, state = nnx.split(self.blocks)
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[which], state))
        spmd.remove_axis(nnx.state(block), 0, LAYER_AXIS)
        return block

    def layers(self) -> list[Any]:
        """The blocks as a list."""
        return self[:]

    def _functional(
        self, block: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_loop: bool
    ) -> tuple[Layer, tuple[nnx.State, nnx.State]]:
        """The block as a function of x and the block's arrays, and these arrays.

        The function returns the variables that the block changes, such as running statistics:
        neither a scan nor a rematerialised function may write to the module. `in_loop` says that a
        loop separates it from its backward pass. Without one, XLA would replace what is
        rematerialised by what the forward pass computed.
        """
        graphdef, params, rest = split_params(block)

        def layer(x: Array, state: LayerState) -> tuple[Array, nnx.State]:
            *arrays, key = state
            merged = nnx.merge(graphdef, *arrays)
            x = _shard_batch(x)
            random = {} if key is None else {"rngs": nnx.Rngs(dropout=key)}
            y = merged(x, *args, **kwargs, **random)
            kept, found = ((getattr(a, "shape", None), getattr(a, "dtype", a)) for a in (x, y))
            if kept != found:
                raise UserError(
                    f"a block of a Stack must keep the shape and the dtype of x, but it maps "
                    f"{x.dtype}{x.shape} to {found[1]}{found[0]}; correct the block or its rule"
                )
            return y, nnx.state(merged, CHANGES)

        if self.remat != "none":
            layer = jax.checkpoint(
                layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not in_loop
            )
        return layer, (params, rest)


def _chain(layer: Layer, x: Array, arrays: LayerState, unroll: int) -> tuple[Array, nnx.State]:
    """`jax.lax.scan` of `layer`, whose backward pass scans over the gradients of x alone.

    Before this scan, all layers are linearised at once, at their saved inputs. After it, the
    gradients of all parameters are computed at once.
    """

    @jax.custom_vjp
    def run(x: Array, arrays: LayerState) -> tuple[Array, nnx.State]:
        return jax.lax.scan(layer, x, arrays, unroll=unroll)

    def forward(x: Array, arrays: LayerState) -> Any:
        def keep(x: Array, state: LayerState) -> Any:
            y, updated = layer(x, state)
            return y, (updated, x)

        y, (updated, inputs) = jax.lax.scan(keep, x, arrays, unroll=unroll)
        return (y, updated), (inputs, arrays)

    def backward(saved: Any, gradients: Any) -> Any:
        inputs, (params, *rest) = saved

        def linearise(x: Array, params: nnx.State, rest: Any) -> Any:
            return jax.vjp(lambda x, params: layer(x, (params, *rest))[0], x, params)[1]

        def step(gradient: Array, pull: Any) -> tuple[Array, Array]:
            return pull(gradient)[0], gradient

        pulls = jax.vmap(linearise)(inputs, params, rest)
        first, each = jax.lax.scan(step, gradients[0], pulls, reverse=True, unroll=unroll)
        return first, (jax.vmap(lambda pull, g: pull(g)[1])(pulls, each), None, None)

    run.defvjp(forward, backward)
    return run(x, arrays)


def _shard_batch(x: Array) -> Array:
    """Shards the batch along the mesh's batch axes, if it divides among their devices.

    Otherwise the compiler may shard activations instead of fetching one layer's sharded weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = devices.batch_shards(mesh)
    is_eager = not isinstance(x, jax.core.Tracer)  # and the array may be on one device
    if is_eager or shards == 1 or x.shape[0] % shards:
        return x
    spec = PartitionSpec(devices.batch_axes(mesh), *(None,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)


def split_params(module: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A module as its structure, its parameters, and its other arrays."""
    graphdef, params, *rest = nnx.split(module, nnx.Param, ...)
    return graphdef, params, rest[0]
