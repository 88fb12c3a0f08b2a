"""A small ReZero Transformer that learns to write Python on a CPU, byte by byte.

python train.py --config=configs/transformer_small.py --workdir=runs/stdlib
    4 layers on the sources of Python's standard library; several minutes on 2 cores

python sample.py --workdir=runs/stdlib --prompt="def main("
    samples text from the model

python train.py --config=configs/transformer_small.py:path=book.txt --workdir=runs/book
    trains on your own text, a file or a folder

python train.py --config=configs/transformer_small.py:residual=pre_norm --workdir=runs/pre_norm
    a baseline: post_norm, pre_norm or gpt2_norm; rezero,alpha_init=1 starts with open gates
"""

from ml_collections import ConfigDict

from rezero_jax.config import base_config, parse_arg
from rezero_jax.devices import default_cpu_devices
from rezero_jax.models.build import rule_named, transformer_model


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "path=book.txt,residual=pre_norm"."""
    args = parse_arg(
        arg,
        residual="rezero",
        alpha_init=float,
        depth=4,
        width=128,
        length=128,
        path=str,
        steps=int,
        smoke=False,
    )
    config = base_config()
    config.model = transformer_model()
    config.model.residual = args.residual
    config.model.alpha_init = args.alpha_init
    config.model.depth = 2 if args.smoke else args.depth
    config.model.width = 16 if args.smoke else args.width
    config.model.heads = 4
    config.model.max_len = 8 if args.smoke else args.length
    config.model.positions = "rotary"
    config.model.final_norm = rule_named(args.residual).norms_branch
    # On a CPU, unrolling 12 layers saves a fifth of the time, but deep stacks compile slowly.
    config.model.scan = args.depth > 16

    config.data.name = "text" if args.path else "stdlib"
    config.data.path = args.path
    config.data.length = config.model.max_len
    config.data.windows = "random"

    config.train.steps = args.steps or (50 if args.smoke else 1000)
    config.train.batch_size = 16
    config.train.steps_per_dispatch = 10

    config.optim.name = "adamw"
    config.optim.learning_rate = 0.003
    config.optim.schedule = "cosine"
    config.optim.b2 = 0.99
    config.optim.clip_norm = 1.0

    config.mesh.cpu_devices = default_cpu_devices()

    config.eval.every_steps = 250
    config.eval.batch_size = 64
    config.eval.examples = 256 if args.smoke else None
    config.checkpoint.every_steps = 250
    config.log.every_steps = 10
    return config
