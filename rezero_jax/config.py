"""Configs: the fields that every experiment has, and the files that fill them in."""

import importlib.util
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from rezero_jax.errors import UserError, choose_from, closest_beside
from rezero_jax.fields import assign, override
from rezero_jax.ranges import check_ranges


def base_config() -> ConfigDict:
    """Every field a run can have, with its default; a file in configs/ fills in an experiment.

    A field with a type instead of a value is unset.
    """
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()

    config.data = ConfigDict()
    config.data.name = "digits"  # see rezero_jax.data.NAMES
    config.data.dir = config_dict.placeholder(str)  # unset: $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.stream = False  # True: read from disk while training, for data larger than memory
    config.data.workers = (
        0  # processes that decode streamed training images; 0: threads of this one
    )
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

    config.train = ConfigDict()
    config.train.steps = config_dict.placeholder(int)  # exactly one of these three sets the length
    config.train.epochs = config_dict.placeholder(float)
    config.train.examples = config_dict.placeholder(int)
    # The run ends earlier, with the first epoch whose mean training loss (nats) is at most this.
    config.train.until_loss = config_dict.placeholder(float)
    config.train.batch_size = 128
    # Parts in which one device computes a batch, to save memory; several need fewer. Networks with
    # BatchNorm always have so many.
    config.train.accumulate = 1
    config.train.steps_per_dispatch = 1  # updates made by the device between two visits of the host

    config.eval = ConfigDict()
    config.eval.every_steps = config_dict.placeholder(int)  # at most one; none: only at the end
    config.eval.every_epochs = config_dict.placeholder(float)
    config.eval.every_examples = config_dict.placeholder(int)
    config.eval.batch_size = 1000
    config.eval.examples = config_dict.placeholder(int)  # the first so many; unset: all

    config.optim = ConfigDict()
    config.optim.name = "adagrad"  # adagrad, sgd, adamw, lamb, muon
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
    config.optim.momentum_points = ()  # sgd: (fraction of the run, momentum) instead of momentum
    config.optim.nesterov = False  # sgd
    config.optim.b1 = 0.9  # adamw, lamb, muon
    config.optim.b2 = 0.999  # adamw, lamb, muon
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
    model.residual = "rezero"  # a name of rezero_jax.residual.RULES
    model.alpha_init = config_dict.placeholder(float)  # unset: the rule's own, as 0 for rezero
    model.alpha_per = "layer"  # layer, sublayer
    model.norm = "layer_norm"  # layer_norm, dyt: wherever there is a norm
    model.base_depth = 2  # completep, depth_mup: the depth at which they are pre_norm
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
    model.dtype = "auto"  # float32, bfloat16, auto: bfloat16 on accelerators, float32 on a CPU
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
        assign(values, key, text or "True", shown=key)
    return values


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The locked config of `--config=SPEC --config.a.b=value ...`.

    Args:
      spec: FILE or FILE:ARG, where FILE defines `get_config(arg: str) -> ConfigDict`.
      overrides: texts "a.b=value"; a length of the run replaces that of the file.

    Raises:
      UserError: the file is missing or fails, a key is unknown (the sentence names the closest), or
        a value has another type or is out of range.
    """
    path, _, arg = spec.partition(":")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name one of the config files in it")
    if not Path(path).is_file():
        close = closest_beside(Path(path))
        hint = f"did you mean {close}? The" if close else "the"
        raise UserError(f"there is no config file {path}; {hint} project's own are in configs/")
    module_spec = importlib.util.spec_from_file_location("config_file", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config file ends in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} is not a config file; it must define get_config(arg)")
        config = module.get_config(arg)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"the config file {_where(error, path)} failed ({type(error).__name__}: {error}); "
            "correct it"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config in {path} returned a {type(config).__name__}; it must return a "
            "ConfigDict, such as that of rezero_jax.config.base_config"
        )
    override(config, overrides)
    check_ranges(config)
    return config.lock()


def _where(error: BaseException, path: str) -> str:
    """The file and line at which a config file failed: its own line, if that took part."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno},"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == Path(path).absolute()]
    return f"{path}, line {own[-1].lineno}," if own else path
