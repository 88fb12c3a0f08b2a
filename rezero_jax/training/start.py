"""How a run begins: with the parameters of another model, or as a longer version of itself."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rezero_jax import processes
from rezero_jax.config import differences
from rezero_jax.data.split import content_hash
from rezero_jax.errors import UserError, foreign
from rezero_jax.formatting import path_text
from rezero_jax.models.weights import load_tensors, variables_of
from rezero_jax.residual import Constant
from rezero_jax.runs.files import AnyPath, folder_of, read_json
from rezero_jax.runs.folder import LENGTH_FIELDS, TOPOLOGY, recorded_config, saved_steps
from rezero_jax.training.intervals import Intervals
from rezero_jax.training.load import load_state
from rezero_jax.training.optim import has_same_rates
from rezero_jax.training.state import State
from rezero_jax.training.trainer import Trainer

HEAD = {"head", "head_bias"}  # names of the modules and parameters that make the logits
LAYER = re.compile(r"\bblocks\.\d+\.")  # in the names of an unrolled stack


@dataclasses.dataclass(frozen=True)
class Start:
    """Initial values from another model.

    Attributes:
      values: the arrays by the name of the variable, such as "head.kernel".
      record: "source", "steps" (None for a file), "content", a hash of its arrays, and "new_head",
        why the head has new values, or None.
    """

    values: Mapping[str, np.ndarray]
    record: dict[str, Any]

    def __str__(self) -> str:
        after = "" if self.record["steps"] is None else f" after {self.record['steps']:,} updates"
        head = f"; the head is new, as {self.record['new_head']}" if self.record["new_head"] else ""
        return f"beginning with {len(self.values)} arrays of {self.record['source']}{after}{head}"

    def apply(self, state: State) -> State:
        """The state with the values in it, sharded as before."""

        def replace(path: Any, leaf: jax.Array) -> jax.Array:
            if (value := self.values.get(_name(path))) is None:
                return leaf
            value = np.asarray(value, leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)

        arrays = {key: state[key] for key in ("params", "stats")}
        with jax.transfer_guard_host_to_device("allow"):  # these transfers are intended
            replaced = jax.tree.map_with_path(replace, arrays)
        # The memory of a NumPy array cannot be donated to an update.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, arrays)
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        return state | copy(replaced)


def read_start(trainer: Trainer) -> Start | None:
    """The start from train.init_from, or None if it is unset; imports no code that a run names.

    Raises a UserError if the source cannot be read, or has other arrays, except in the head.
    """
    if (source := trainer.config.train.get("init_from")) is None:
        return None
    arrays, steps = _read(source)
    shapes = (trainer.shapes[key] for key in ("params", "stats"))
    variables = variables_of(trainer.spec.model(*shapes))
    constants = {name for name in variables if isinstance(variables[name], Constant)}
    own = _by_stack(constants)
    here, there = (
        {name: found for name, found in _by_stack(names).items() if name not in own}
        for names in (variables, arrays)
    )
    heads: list[str] = []
    wrong: list[str] = []
    for name in sorted(here.keys() | there.keys()):
        old, new = _shape(there.get(name), arrays), _shape(here.get(name), variables)
        if old != new:
            (heads if _is_of_head(name) else wrong).append(f"{name} is {old} there and {new} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"train.init_from={source} is of another model ({'; '.join(wrong[:3])}{more}); only "
            "the head may differ, so set config.model as it is there"
        )
    values: dict[str, np.ndarray] = {}
    for name, names in here.items():
        if not (heads and _is_of_head(name)):
            values |= _converted([arrays[one] for one in there[name]], there[name], names)
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise UserError(f"train.init_from={source}: {name} is not finite; choose another one")
    content = content_hash(*(arrays[name] for name in sorted(arrays)))
    record = {"source": source, "steps": steps, "content": content}
    return Start(values, record | {"new_head": "; ".join(heads) or None})


def _read(source: str) -> tuple[dict[str, np.ndarray], int | None]:
    """The arrays of a source by the name of the variable, and the updates that a run had made."""
    path = folder_of(source)
    if (path / "checkpoints").exists():
        state = load_state(source, None)
        leaves = jax.tree.leaves_with_path({key: state[key] for key in ("params", "stats")})
        return {_name(path): np.asarray(leaf) for path, leaf in leaves}, int(state["step"])
    return processes.on_first_then_others(lambda: _read_file(path, source)), None


def _read_file(path: epath.Path, source: str) -> dict[str, np.ndarray]:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists():
        raise UserError(
            f"train.init_from={source} is neither a run with checkpoints, nor an exported model, "
            "nor a .safetensors file; correct the path"
        )
    if path.is_dir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if read_json(path / "config.json").get("sha256") != digest:
            raise UserError(f"{file} is damaged; export the run again")
    return load_tensors(file)


def _is_of_head(name: str) -> bool:
    return not HEAD.isdisjoint(name.split("."))


def _name(path: Any) -> str:
    """The name of a variable, such as "head.kernel", from its path in params or stats."""
    return path_text(path).partition("/")[2].replace("/", ".")


def _by_stack(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the name in a scanned stack, where the names of unrolled layers are in order."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        found.setdefault(LAYER.sub("blocks.", name), []).append(name)
    return found


def _shape(names: Sequence[str] | None, arrays: Mapping[str, Any]) -> str:
    """The shape that an array has in a scanned stack, and its dtype if it is not floating."""
    if names is None:
        return "absent"
    layers = (len(names),) if LAYER.search(names[0]) else ()
    kinds = {
        ("" if jnp.issubdtype(arrays[name].dtype, jnp.floating) else str(arrays[name].dtype))
        + str((*layers, *arrays[name].shape))
        for name in names
    }
    return " and ".join(sorted(kinds))


def _converted(
    arrays: Sequence[np.ndarray], there: Sequence[str], here: Sequence[str]
) -> dict[str, np.ndarray]:
    """The arrays of the names `there` as those of the names `here`, scanned or unrolled."""
    stacked = np.stack(arrays) if LAYER.search(there[0]) else arrays[0]
    if not LAYER.search(here[0]):
        return {here[0]: stacked}
    return {name: np.asarray(layer) for name, layer in zip(here, stacked, strict=True)}


def lengthens(workdir: AnyPath, trainer: Trainer) -> bool:
    """Whether the config is that of the run in `workdir`, except that the run is longer.

    Raises a UserError if the longer run would have made the same updates at other rates.
    """
    if not (folder_of(workdir) / "config.json").exists():
        return False
    old = recorded_config(workdir)
    configs = (json.loads(config.to_json()) for config in (old, trainer.config))
    changes = [line for line in differences(*configs) if not line.startswith(TOPOLOGY)]
    if not changes or not all(line.startswith(LENGTH_FIELDS) for line in changes):
        return False
    size, total = trainer.dataset.train.size, trainer.intervals.total
    with foreign(folder_of(workdir) / "config.json"):
        before = Intervals.from_config(old, size).total
    made = max(saved_steps(workdir), default=0)
    if total <= before:
        return False
    if not has_same_rates(trainer.config.optim, before, total, made):
        raise UserError(
            f"{workdir} holds a run of {before:,} steps, and the learning rates of the {made:,} "
            f"that it has made would be others in a run of {total:,}; to train further, begin a "
            f"new --workdir with --config.train.init_from={workdir}"
        )
    return True
