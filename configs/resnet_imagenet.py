"""PreAct-ResNet-50 with ReZero on ImageNet, for accelerators; not an experiment of the paper.

    python train.py --config=configs/resnet_imagenet.py:depth=50 --workdir=runs/imagenet
        90 epochs of the usual recipe: SGD at a rate of 0.1 for batches of 256, divided by 10 after
        30, 60 and 80 epochs, random resized crops of 224 pixels and flips. We have no result yet

The data set is read from disk while training; see docs/data.md for the location of its archives.
"""

from ml_collections import ConfigDict, config_dict

from rezero_jax.config import base_config, parse_arg
from rezero_jax.devices import default_cpu_devices


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "depth=18,residual=residual"."""
    args = parse_arg(arg, depth=50, residual="rezero", epochs=float, batch=256, smoke=False)
    config = base_config()
    config.model.name = "resnet"
    config.model.family = "preact"
    config.model.depth = 18 if args.smoke else args.depth
    config.model.residual = args.residual
    config.model.width = 2 if args.smoke else 64
    config.model.batch_norm = True
    config.model.stem = "imagenet"
    config.model.alpha_init = config_dict.placeholder(float)  # unset: 0
    config.model.scan = False
    config.model.remat = "none"
    config.model.dtype = "auto"

    config.data.name = "digits" if args.smoke else "imagenet"
    config.data.flip = True

    config.train.epochs = args.epochs or (1.0 if args.smoke else 90.0)
    config.train.batch_size = args.batch

    config.optim.name = "sgd"
    config.optim.learning_rate = 0.1 * args.batch / 256
    config.optim.weight_decay = 1e-4
    config.optim.schedule = "multistep"
    config.optim.milestones = (30 / 90, 60 / 90, 80 / 90)

    config.mesh.cpu_devices = default_cpu_devices()

    config.eval.every_epochs = 1.0
    config.eval.batch_size = 256
    return config
