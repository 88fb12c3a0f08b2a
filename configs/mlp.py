"""Deep fully connected networks (paper, section 4; the authors' notebook).

    python train.py --config=configs/mlp.py --workdir=runs/digits
        a 32-layer ReZero network on scikit-learn's digits: about 97 % accuracy, in seconds

    python train.py --config=configs/mlp.py:residual=rezero,depth=64,dataset=cifar10 --workdir=...
        the notebook's run: epoch losses 1.67, 1.37, 1.24, ... 0.52; about 4 minutes on 2 cores.
        residual=plain, residual and norm are its three baselines

    python train.py --config=configs/mlp.py:depth=32,dataset=cifar10,epochs=300 --workdir=...
        Figure 5 of the paper

    python train.py --config=configs/mlp.py:depth=10000,width=150,lr=0.003,dataset=cifar10 ...
        the 10,000-layer network of the paper's section 4

Two runs of a comparison differ only in `model.residual` and, with it, in the variance of the hidden
weights: 0.25 / width for `residual`, 2 / width for every other rule (paper, section 4).

The paper does not state batch size, scaling and augmentation. As in the authors' notebook, batches
have 100 examples, pixels are scaled to -1 .. 1, and nothing is augmented. Unlike in the notebook,
the layers of `norm` do not share one LayerNorm.
"""

from ml_collections import ConfigDict, config_dict

from rezero_jax.config import base_config, option_fields, parse_arg
from rezero_jax.residual import RuleConfig


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "residual=rezero,depth=64,dataset=cifar10"."""
    args = parse_arg(
        arg,
        residual="rezero",
        depth=32,
        width=int,
        dataset="digits",
        lr=0.01,
        epochs=float,
        smoke=False,
    )
    digits = args.dataset == "digits"
    config = base_config()
    config.model = option_fields(RuleConfig())
    config.model.name = "mlp"
    config.model.residual = args.residual
    config.model.depth = 4 if args.smoke else args.depth
    config.model.width = 8 if args.smoke else args.width or (64 if digits else 256)
    # Unset: 0.25 for `residual` and 2 for every other rule, also if the command overrides the rule.
    config.model.weight_variance = config_dict.placeholder(float)
    config.model.scan = True
    config.model.remat = "none"
    config.model.dtype = "float32"  # bfloat16 is slower by the TPU compiler's estimate

    config.data.name = args.dataset

    config.train.epochs = args.epochs or (2.0 if args.smoke else 20.0 if digits else 10.0)
    config.train.batch_size = 50 if digits else 100
    # A Ctrl-C waits for the end of a dispatch.
    depth = config.model.depth
    config.train.steps_per_dispatch = 20 if depth < 500 else 5

    config.optim.name = "adagrad"
    config.optim.learning_rate = args.lr

    config.eval.every_epochs = 1.0
    config.checkpoint.every_steps = 500 if depth < 500 else 100
    config.log.every_steps = 5 if digits else config.train.steps_per_dispatch
    return config
