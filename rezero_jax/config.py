"""Configs: the fields every experiment has, and how a command line names and changes them."""

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from rezero_jax.errors import UserError, choose_from, closest_beside


def base_config() -> ConfigDict:
    """Every field a run can have, with its default; a file in configs/ fills in an experiment.

    A field that shows a type in place of a value is unset.
    """
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()

    config.data = ConfigDict()
    config.data.name = "digits"  # see rezero_jax.data.NAMES
    config.data.dir = config_dict.placeholder(str)  # unset: $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.stream = False  # True: read from disk while training, for data larger than memory
    # Per channel, of pixels scaled to 0 .. 1; unset: the data set's own.
    config.data.mean = config_dict.placeholder(tuple)
    config.data.std = config_dict.placeholder(tuple)
    config.data.image_size = 224  # imagenet
    config.data.crop_padding = 0  # random crops of images padded by this many pixels
    config.data.flip = False  # left to right, for half of the images
    config.data.jitter = 0.0  # brightness, contrast and saturation vary by this fraction
    config.data.rotation = 0.0  # degrees, at most
    config.data.path = config_dict.placeholder(str)  # text: the file or folder
    config.data.length = 256  # text: bytes in an example
    config.data.windows = "segments"  # text: what is trained on; segments, random
    config.data.context = 0  # text: bytes at least that lead up to each byte in an evaluation
    config.data.eval_split = "validation"  # text: validation, test
    # What shuffles the examples, and draws random windows and imagenet's crops: hash (the same with
    # every version of NumPy), numpy (as in runs made before this field existed).
    config.data.order = "hash"

    config.train = ConfigDict()
    config.train.steps = config_dict.placeholder(int)  # exactly one of these three sets the length
    config.train.epochs = config_dict.placeholder(float)
    config.train.examples = config_dict.placeholder(int)
    config.train.batch_size = 128
    config.train.accumulate = 1  # split each batch into this many parts and average their gradients
    config.train.steps_per_dispatch = 1  # updates made by the device between two visits of the host

    config.eval = ConfigDict()
    config.eval.every_steps = config_dict.placeholder(int)  # at most one; none: only at the end
    config.eval.every_epochs = config_dict.placeholder(float)
    config.eval.every_examples = config_dict.placeholder(int)
    config.eval.batch_size = 1000
    config.eval.examples = config_dict.placeholder(int)  # the first so many; unset: all

    config.optim = ConfigDict()
    config.optim.name = "adagrad"  # adagrad, sgd, adamw, lamb
    config.optim.learning_rate = 0.01
    config.optim.weight_decay = 0.0
    config.optim.schedule = "constant"  # constant, linear, cosine, multistep, piecewise
    config.optim.warmup_steps = 0
    config.optim.milestones = (0.5, 0.75)  # multistep: fractions of the run at which the rate drops
    config.optim.decay_factor = 0.1  # multistep: what each milestone multiplies the rate by
    # piecewise: (fraction of the run, fraction of learning_rate), joined by straight lines
    config.optim.points = ((0.0, 1.0), (1.0, 0.0))
    config.optim.clip_norm = config_dict.placeholder(float)  # global gradient norm, all groups
    config.optim.momentum = 0.9  # sgd
    config.optim.momentum_points = ()  # sgd: (fraction of the run, momentum) in place of momentum
    config.optim.nesterov = False  # sgd
    config.optim.b1 = 0.9  # adamw, lamb
    config.optim.b2 = 0.999  # adamw, lamb
    config.optim.alpha = optim_group(weight_decay=0.0)  # every gate, by type
    config.optim.groups = ConfigDict()  # name -> optim_group(path=...): other parameters, by path

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 3  # the newest ones
    config.checkpoint.keep_every_steps = config_dict.placeholder(int)  # and each multiple of this
    config.checkpoint.keep_best = 0  # and those of lowest eval/loss

    config.log = ConfigDict()
    config.log.every_steps = 50

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that share a batch; -1: all there are, divided by mesh.model
    config.mesh.model = 1  # devices that share each weight matrix of a Transformer or MLP
    config.mesh.fully_sharded = False  # True: spread the state over mesh.data as well
    # How many devices a CPU poses as; unset: one. Read by train.py, before JAX starts.
    config.mesh.cpu_devices = config_dict.placeholder(int)
    return config


def transformer_model() -> ConfigDict:
    """config.model of a byte-level language model, but for its depth, width, heads and max_len."""
    model = ConfigDict()
    model.name = "transformer"
    model.residual = "rezero"  # post_norm, pre_norm, gpt2_norm, rezero
    model.alpha_init = 0.0
    model.alpha_per = "layer"  # layer, sublayer
    model.kv_heads = config_dict.placeholder(int)  # unset: as many as heads
    model.feedforward = config_dict.placeholder(int)  # unset: 4 times the width
    model.vocab_size = 256
    model.positions = "sinusoidal"  # sinusoidal, learned, rotary
    model.tied = False  # the head's weights are the embedding's
    model.final_norm = False
    model.activation = "gelu"  # gelu, relu
    model.dropout = 0.0
    model.bias = True
    model.scan = True
    model.remat = "none"
    model.dtype = "float32"  # float32, bfloat16
    return model


def optim_group(
    path: str | None = None,
    name: str | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    schedule: str | None = None,
    milestones: tuple[float, ...] | None = None,
    decay_factor: float | None = None,
) -> ConfigDict:
    """Settings of a parameter group; what is None is as in config.optim.

    Args:
      path: regular expression searched for in a parameter's path, such as "head/bias".
      name, learning_rate, weight_decay, schedule, milestones, decay_factor: as in config.optim.
    """
    group = ConfigDict()
    for key, kind, value in (
        ("path", str, path),
        ("name", str, name),
        ("learning_rate", float, learning_rate),
        ("weight_decay", float, weight_decay),
        ("schedule", str, schedule),
        ("milestones", tuple, milestones),
        ("decay_factor", float, decay_factor),
    ):
        group[key] = config_dict.placeholder(kind)
        group[key] = value
    return group


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Reads the part of `--config=FILE:ARG` after the colon: "key=value,key=value,switch".

    Args:
      arg: the text; a key alone sets a bool to True.
      **defaults: every key there is, with its default, whose type the value must have; a default
        that is a type stands for an unset value of this type.

    Raises:
      UserError: an unknown key or a value of another type.
    """
    values = ConfigDict()
    for key, default in defaults.items():
        values[key] = config_dict.placeholder(default) if isinstance(default, type) else default
    for part in filter(None, arg.split(",")):
        key, _, text = part.partition("=")
        if key not in defaults:
            raise choose_from("config argument", key, defaults)
        _assign(values, key, text or "True", shown=key)
    return values


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config that `--config=SPEC --config.a.b=value ...` means, locked.

    Args:
      spec: FILE or FILE:ARG, where FILE defines `get_config(arg: str) -> ConfigDict`.
      overrides: texts "a.b=value".

    Raises:
      UserError: a missing file, an unknown key (naming the closest) or a value of another type.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        close = closest_beside(Path(path))
        hint = f"did you mean {close}? The" if close else "the"
        raise UserError(f"there is no config file {path}; {hint} project's own are in configs/")
    module_spec = importlib.util.spec_from_file_location("config_file", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config file ends in .py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} is not a config file; it must define get_config(arg)")
    config = module.get_config(arg)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
        *parents, last = key.split(".")
        group = config
        for parent in parents:
            group = group.get(parent)
            if not isinstance(group, ConfigDict):
                raise _unknown_key(config, key)
        if last not in group or isinstance(group.get(last), ConfigDict):
            raise _unknown_key(config, key)
        _assign(group, last, text, shown=f"config.{key}")
    return config.lock()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One text "key: old -> new" for each leaf in which two nested dicts differ."""
    flat_old, flat_new = flatten(old), flatten(new)
    return [
        f"{key}: {flat_old.get(key, 'absent')} -> {flat_new.get(key, 'absent')}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def _assign(group: ConfigDict, key: str, text: str, shown: str) -> None:
    wanted = group.get_type(key)
    may_be_unset = isinstance(
        dict(group.items(preserve_field_references=True))[key], config_dict.FieldReference
    )
    try:
        if may_be_unset and text.strip().lower() == "none":
            value = None
        else:
            value = text if wanted is str else ast.literal_eval(text.strip().capitalize())
            if wanted is tuple and not isinstance(value, tuple):
                value = (value,)
            if value is None or (isinstance(value, bool) and wanted is not bool):
                raise ValueError
        group[key] = value
    except (TypeError, ValueError, SyntaxError):
        kind = {"int": "a whole number", "float": "a number", "bool": "True or False"}
        name = kind.get(wanted.__name__, f"a {wanted.__name__}")
        raise UserError(f"{shown} takes {name}, not {text!r}") from None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"a.b": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _unknown_key(config: ConfigDict, key: str) -> UserError:
    keys = sorted(flatten(config.to_dict()))
    group, _, last = key.rpartition(".")
    siblings = {k.removeprefix(f"{group}."): k for k in keys if k.startswith(f"{group}.")}
    # Within a group that exists only the last name can be wrong: what precedes it would make any
    # two keys look alike.
    close = difflib.get_close_matches(last, siblings, n=1)
    close = [siblings[c] for c in close] or (
        [] if siblings else difflib.get_close_matches(key, keys, n=1)
    )
    valid = ", ".join(siblings.values() or keys)
    hint = f'did you mean "{close[0]}"?' if close else f"the keys are {valid}"
    return UserError(f'unknown config key "{key}"; {hint}')
