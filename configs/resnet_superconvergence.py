"""Super-convergence of PreAct-ResNet-18 on CIFAR-10 (paper, section 4; supplement E.2; its code).

    python train.py --config=configs/resnet_superconvergence.py --workdir=runs/superconvergence
        45 epochs of ReZero: 94.0 % test accuracy in the authors' log, at epoch 44; for accelerators

    python train.py --config=configs/resnet_superconvergence.py:residual=residual --workdir=...
        the baseline, which reaches 94 % at epoch 60: 65 epochs, a longer rise, no gates

The learning rate rises to 1.2 and falls again while momentum does the opposite. The gates have
their own Adagrad with a constant learning rate of 0.1 and no decay, because gates under the cyclic
SGD became NaN for the authors.

Batches straddle epochs, so 45 epochs are 4,395 updates of 512 examples. The authors have 4,410,
with a smaller last batch in each epoch. The authors' log does not state two choices for the
baseline: its learning rate rises and falls for 39 % of the run each, and its momentum mirrors the
learning rate between 0.95 and 0.85.
"""

from ml_collections import ConfigDict, config_dict

from rezero_jax.config import base_config, parse_arg
from rezero_jax.devices import default_cpu_devices


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "residual=residual,epochs=65"."""
    args = parse_arg(arg, residual="rezero", epochs=float, smoke=False)
    rezero = args.residual == "rezero"
    config = base_config()
    config.model.name = "resnet"
    config.model.family = "preact"
    config.model.depth = 18
    config.model.residual = args.residual
    config.model.width = 2 if args.smoke else 64
    config.model.batch_norm = True
    config.model.stem = "cifar"
    config.model.alpha_init = config_dict.placeholder(float)  # unset: 0
    config.model.scan = False
    config.model.remat = "none"
    config.model.dtype = "float32"  # bfloat16 is slower by the TPU compiler's estimate

    config.data.name = "digits" if args.smoke else "cifar10"
    if not args.smoke:
        config.data.mean = (0.4914, 0.48216, 0.44653)
        config.data.std = (0.24703, 0.24349, 0.26159)
    config.data.crop_padding = 4
    config.data.flip = True
    config.data.jitter = 0.25
    config.data.rotation = 2.0

    config.train.epochs = args.epochs or (1.0 if args.smoke else 45.0 if rezero else 65.0)
    config.train.batch_size = 512
    config.train.steps_per_dispatch = 2

    config.optim.name = "sgd"
    config.optim.learning_rate = 1.2  # the peak
    config.optim.weight_decay = 2e-4
    config.optim.schedule = "piecewise"
    if rezero:
        low, end = 0.032 / 1.2, 0.001 / 1.2
        config.optim.points = ((0.0, low), (0.1, 1.0), (0.9, low), (1.0, end))
        config.optim.momentum_points = ((0.0, 0.95), (0.1, 0.85), (0.9, 0.95))
    else:
        config.optim.points = ((0.0, 0.04), (0.39, 1.0), (0.78, 0.04), (1.0, 0.0004))
        config.optim.momentum_points = ((0.0, 0.95), (0.39, 0.85), (0.78, 0.95))
    config.optim.alpha.name = "adagrad"
    config.optim.alpha.learning_rate = 0.1
    config.optim.alpha.schedule = "constant"

    config.mesh.cpu_devices = default_cpu_devices()

    config.eval.every_epochs = 1.0
    config.checkpoint.every_steps = 100
    config.log.every_steps = 2
    return config
