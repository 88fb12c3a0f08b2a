"""Config fields with their defaults, config files, and command-line overrides."""

import ast
import functools
import os
import runpy
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

from rezero_jax.errors import UserError, check_choice, choose_from, hint_beside

# Alternative units of one length, by section; at most one of the fields is set.
LENGTHS = {
    "train": ("steps", "epochs", "examples"),
    "eval": ("every_steps", "every_epochs", "every_examples"),
}
LARGEST = 2**31 - 1  # of int32
LARGEST_FLOAT = 3.4e38  # of float32, rounded down


def base_config() -> ConfigDict:
    """All config fields with their defaults; a placeholder is unset (None)."""
    config = ConfigDict()
    config.seed = 0  # seeds the initial parameters, the shuffling, augmentation and dropout

    config.model = ConfigDict()  # its fields depend on model.name; each config file sets them

    config.data = ConfigDict()
    config.data.name = "digits"  # a name of rezero_jax.data.NAMES, or tfds:NAME
    config.data.dir = config_dict.placeholder(str)  # unset: $TFDS_DATA_DIR, ~/tensorflow_datasets
    config.data.stream = False  # read images from disk while training, instead of once into memory
    config.data.workers = 0  # processes that decode streamed training images; 0: threads
    # Channel means and standard deviations of pixels in 0 .. 1; unset: the data set's defaults.
    config.data.mean = config_dict.placeholder(tuple)
    config.data.std = config_dict.placeholder(tuple)
    # Side to which images are cropped and resized; unset: 224 for imagenet, else the images' own.
    config.data.image_size = config_dict.placeholder(int)
    config.data.eval_fraction = 0.1  # evaluation share of your own images that have no such split
    # Augmentation of training images, see data.augment; 0 and False disable it.
    config.data.crop_padding = 0  # pixels added on each side before a random crop
    config.data.flip = False  # mirror left to right with probability 1/2
    config.data.jitter = 0.0  # largest relative change of brightness, contrast and saturation
    config.data.rotation = 0.0  # largest angle, in degrees
    config.data.path = config_dict.placeholder(str)  # images, text: file or folder of the data
    config.data.length = 256  # text: bytes in an example
    config.data.windows = "segments"  # text: the training examples; segments, random
    config.data.context = 0  # text: minimum number of bytes before each evaluated byte
    config.data.eval_split = "validation"  # images, text: split to evaluate; validation, test

    config.train = ConfigDict()
    # Length of the run; exactly one of the three is set.
    config.train.steps = config_dict.placeholder(int)
    config.train.epochs = config_dict.placeholder(float)
    config.train.examples = config_dict.placeholder(int)
    # Stop after the first epoch whose mean training loss (nats) is at most this; unset: never.
    config.train.until_loss = config_dict.placeholder(float)
    # A run folder, an exported model or a .safetensors file with the initial parameters.
    config.train.init_from = config_dict.placeholder(str)
    # Your own loss and metrics, "module:name".
    config.train.objective = config_dict.placeholder(str)
    config.train.batch_size = 128
    # Microbatches per batch on one device; more need less memory. Several devices use fewer, and
    # known GPUs the fewest that fit. Networks with BatchNorm always use this number.
    config.train.accumulate = 1
    config.train.steps_per_dispatch = 1  # updates per call of the compiled program

    config.eval = ConfigDict()
    # Interval between evaluations; at most one is set. Unset: one evaluation, at the end.
    config.eval.every_steps = config_dict.placeholder(int)
    config.eval.every_epochs = config_dict.placeholder(float)
    config.eval.every_examples = config_dict.placeholder(int)
    config.eval.batch_size = 1000
    config.eval.examples = config_dict.placeholder(int)  # evaluate the first n; unset: all
    # More metrics for each evaluation: "module:name" of a function, see `Trainer.measure`.
    config.eval.metrics = config_dict.placeholder(str)

    config.optim = ConfigDict()
    config.optim.name = "adagrad"  # adagrad, adamw, lamb, muon, sgd
    config.optim.learning_rate = 0.01  # the peak of the schedule
    config.optim.weight_decay = 0.0
    config.optim.schedule = "constant"  # constant, cosine, linear, multistep, piecewise
    config.optim.warmup_steps = 0  # updates during which the rate rises to the peak
    config.optim.milestones = (0.5, 0.75)  # multistep: fractions of the run at which the rate drops
    config.optim.decay_factor = 0.1  # multistep: factor applied to the rate at each milestone
    # piecewise: (fraction of the run, fraction of learning_rate), interpolated linearly
    config.optim.points = ((0.0, 1.0), (1.0, 0.0))
    config.optim.clip_norm = config_dict.placeholder(float)  # global norm; unset: no clipping
    config.optim.momentum = 0.9  # sgd
    config.optim.momentum_points = ()  # sgd: momentum as (fraction of the run, momentum) pairs
    config.optim.nesterov = False  # sgd
    config.optim.b1 = 0.9  # adamw, lamb, muon: decay rate of the first moment
    config.optim.b2 = 0.999  # adamw, lamb, muon: decay rate of the second moment
    config.optim.alpha = optim_group(weight_decay=0.0)  # settings of all gates
    config.optim.groups = ConfigDict()  # name -> optim_group(path=...), for other parameters

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 3  # keep the newest n checkpoints
    config.checkpoint.keep_every_steps = config_dict.placeholder(int)  # also keep every nth step
    config.checkpoint.keep_best = 0  # also keep the n with the lowest eval/loss

    config.log = ConfigDict()
    config.log.every_steps = 50

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices to shard the batch over; -1: the most that divide it
    config.mesh.model = 1  # devices to shard each weight matrix of a Transformer or MLP over
    config.mesh.fully_sharded = False  # shard parameters and optimizer state over mesh.data as well
    # Number of virtual CPU devices; unset: 1. train.py sets it before JAX starts.
    config.mesh.cpu_devices = config_dict.placeholder(int)
    return config


def option_fields(options: Any) -> ConfigDict:
    """Fields and defaults of an options dataclass as config.model; types like dtype are omitted."""
    section = ConfigDict()
    for name, kind in get_type_hints(type(options)).items():
        kinds = get_args(kind) or (kind,)  # float | None
        if kinds[0] in (bool, int, float, str):
            if type(None) in kinds:
                section[name] = config_dict.placeholder(kinds[0])
            section[name] = getattr(options, name)
    return section


def optim_group(**settings: Any) -> ConfigDict:
    """Optimizer settings of a parameter group; an unset field inherits from config.optim."""
    group = ConfigDict()
    group.path = config_dict.placeholder(str)  # a regular expression, such as "head/bias$"
    for field in ("name", "schedule"):
        group[field] = config_dict.placeholder(str)
    for field in ("learning_rate", "weight_decay", "decay_factor"):
        group[field] = config_dict.placeholder(float)
    group.milestones = config_dict.placeholder(tuple)
    group.lock().update(settings)
    return group


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parses the ARG of `--config=FILE:ARG`: "key=value,key=value,switch".

    A key without a value sets a bool to True. `defaults` has every valid key with its default, or
    with its type if it is unset by default. Raises a UserError for an unknown key or a wrong type.
    """
    values = ConfigDict()
    for key, default in defaults.items():
        values[key] = config_dict.placeholder(default) if isinstance(default, type) else default
    for part in filter(None, arg.split(",")):
        key, _, text = part.partition("=")
        check_choice("config argument", key, defaults)
        assign(values, key, text or "True", shown=key)
    return values


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The locked config of `--config=SPEC --config.a.b=value ...`, with `overrides` "a.b=value".

    `spec` is FILE or FILE:ARG, where FILE defines `get_config(arg: str) -> ConfigDict`.

    Raises:
      UserError: the file is missing or fails, a key is unknown, or a value has the wrong type, is
        not finite or too large for JAX's default dtypes.

    Examples:
      >>> from rezero_jax.config import load_config
      >>> config = load_config("configs/mlp.py:depth=64", ["optim.learning_rate=0.003"])
    """
    path, _, arg = spec.partition(":")
    path = os.path.expanduser(path)
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name one of the config files in it")
    if not Path(path).exists():
        hint = hint_beside(Path(path), "the project's files are in configs/")
        raise UserError(f"there is no config file {path}; {hint}")
    config = _get_config(path, arg)
    override(config, overrides)
    check_numbers(config)
    return config.lock()


def _get_config(path: str, arg: str) -> ConfigDict:
    try:
        variables = runpy.run_path(path)
        if "get_config" not in variables:
            raise UserError(f"{path} is not a config file; it must define get_config(arg)")
        config = variables["get_config"](arg)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        place = f", line {lines[-1]}," if lines else ""  # a SyntaxError contains its line
        raise UserError(
            f"the config file {path}{place} failed ({type(error).__name__}: {error}); correct it"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config in {path} returned a {type(config).__name__}; it must return a ConfigDict"
        )
    return config


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Flattens a nested dict to {"a.b": leaf}."""
    return flatten_dict(tree, sep=".")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "key: old -> new", one for each leaf in which two nested dicts differ."""
    flat_old, flat_new = flatten(old), flatten(new)
    return [
        f"{key}: {flat_old.get(key, 'absent')} -> {flat_new.get(key, 'absent')}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def check_numbers(config: ConfigDict) -> None:
    """Raises UserError for a number that is not finite or too large for JAX's default dtypes.

    The seed is exempt: data.Order checks its bounds.
    """
    for key, value in flatten(config.to_dict()).items():
        is_sequence = isinstance(value, list | tuple)  # lists come from JSON
        numbers = value if is_sequence else (value,)
        if key.endswith("points"):  # pairs
            numbers = jax.tree.leaves(
                value, is_leaf=lambda item: not isinstance(item, list | tuple)
            )
        for number in numbers:
            is_number = isinstance(number, int | float)
            if is_sequence and (not is_number or isinstance(number, bool)):
                raise UserError(f"{key}={value} contains {number!r}; give only numbers")
            most = LARGEST if isinstance(number, int) else LARGEST_FLOAT
            if is_number and not abs(number) <= most and key != "seed":
                raise UserError(
                    f"{key}={number!r:.80} is not finite or too large; give at most {most}"
                )


def override(config: ConfigDict, texts: Iterable[str]) -> None:
    """Sets fields of a config from texts "a.b=value"; raises UserError like `load_config`.

    Setting a length unsets the alternatives in LENGTHS that `texts` does not set.
    """
    keys, given = flatten(config.to_dict()), {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
        section, _, last = key.rpartition(".")
        if key not in keys:
            siblings = [k for k in keys if section and k.rpartition(".")[0] == section]
            raise choose_from("config key", key, siblings or keys)
        parent = functools.reduce(ConfigDict.get, section.split(".") if section else (), config)
        assign(parent, last, value, shown=f"config.{key}")
        given[key] = parent[last]
    for name, fields in LENGTHS.items():
        if any(given.get(f"{name}.{field}") is not None for field in fields):
            for field in fields:
                if f"{name}.{field}" not in given:
                    config[name][field] = None


def assign(section: ConfigDict, key: str, text: str, shown: str) -> None:
    """Sets a field from text, parsed as the field's type; errors call the field `shown`.

    "None" unsets a placeholder.
    """
    wanted = section.get_type(key)
    values = dict(section.items(preserve_field_references=True))
    may_be_unset = isinstance(values[key], config_dict.FieldReference)
    try:
        if may_be_unset and text.strip().lower() == "none":
            value = None
        else:
            value = text if wanted is str else ast.literal_eval(text.strip().capitalize())
            if wanted is tuple:
                value = _tuples(value) if isinstance(value, list | tuple) else (value,)
            if value is None or (isinstance(value, bool) and wanted is not bool):
                raise ValueError
        section[key] = value
    except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError, RecursionError):
        kind = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
        name = kind.get(wanted, "numbers such as (0.5, 0.75)")
        raise UserError(f"{shown} takes {name}, not {text!r:.80}") from None


def _tuples(value: Any) -> Any:
    """Nested lists and tuples as nested tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
