"""The comparison of the rules' learning speed in the paper's section 5, reduced to fit a CPU.

    python train.py --config=configs/transformer_reduced.py:residual=RULE,path=FILE --workdir=...
        RULE is rezero, post_norm, pre_norm or gpt2_norm. rezero,alpha_init=1 starts with open
        gates; post_norm,warmup=100 has a warm-up

As in the paper, all rules have 12 layers, no final norm, and LAMB at the same constant learning
rate, 0.0005 sqrt(batch) = 0.002. Width, feed-forward and heads are 128, 256 and 8 (paper: 512,
2048 and 2). An update sees 2,048 bytes (paper: 552,960), without dropout (paper: 0.2). Runs of this
size neither confirm nor refute the paper.
"""

from ml_collections import ConfigDict

from rezero_jax.config import base_config, parse_arg
from rezero_jax.devices import default_cpu_devices
from rezero_jax.models.build import transformer_model


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "residual=post_norm,warmup=100,path=book.txt"."""
    args = parse_arg(
        arg,
        residual="rezero",
        alpha_init=float,
        warmup=0,
        path=str,
        lr=0.002,
        steps=int,
        smoke=False,
    )
    config = base_config()
    config.model = transformer_model()
    config.model.residual = args.residual
    config.model.alpha_init = args.alpha_init
    config.model.depth = 2 if args.smoke else 12
    config.model.width = 16 if args.smoke else 128
    config.model.heads = 8
    config.model.feedforward = 256
    config.model.max_len = 16 if args.smoke else 128

    config.data.name = "text" if args.path else "stdlib"
    config.data.path = args.path
    config.data.length = config.model.max_len

    config.train.steps = args.steps or (50 if args.smoke else 500)
    config.train.batch_size = 16
    config.train.steps_per_dispatch = 5

    config.optim.name = "lamb"
    config.optim.learning_rate = args.lr
    config.optim.warmup_steps = args.warmup

    config.mesh.cpu_devices = default_cpu_devices()

    config.eval.every_steps = 25
    config.eval.examples = 256  # 32 KiB; the whole split would take longer than the training
    config.eval.batch_size = 128
    config.checkpoint.every_steps = 200
    config.log.every_steps = 5
    return config
