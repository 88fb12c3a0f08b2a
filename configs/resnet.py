"""Residual networks on CIFAR-10 (paper, section 4 and supplement E; the authors' notebook).

    python train.py --config=configs/resnet.py:depth=56,residual=rezero,recipe=paper --workdir=...
        a row of the paper's table: 200 epochs, 6.58 % test error in the paper. depth is 20, 32, 44,
        56 or 110; residual is residual, zero_gamma, gated, fixup, skipinit or rezero

    python train.py --config=configs/resnet.py:family=preact,depth=18,residual=rezero --workdir=...
        the pre-activation rows: depth 18, 34 or 50; 5.43 % test error in the paper

    python train.py --config=configs/resnet.py:depth=20,recipe=notebook,lr=0.2,epochs=1 ...
        the notebook's short runs: 49.5 % after one epoch of ReZero; a few minutes on 2 cores

    python train.py --config=configs/resnet.py:depth=20,epochs=10 ...
        the paper's recipe, with its schedule shortened to a twentieth

Two runs of a comparison differ only in `model.residual` and, as in the authors' code, in settings
of the rule: the initial weights of `gated` and `fixup`, and the learning rate of Fixup's
multipliers. batch_norm=False removes every BatchNorm. lr= scales the learning rate of every group.

recipe=paper follows the code behind the table: weight decay 5e-4 on every parameter, including the
gates, and a learning rate of 0.1 that drops tenfold at 1/2 and at 3/4 of the run. Biases and
Fixup's multipliers have 0.01, which drops a hundredfold at 1/2 of the run, a bug in the authors'
code that this recipe reproduces. recipe=notebook has weight decay 1e-4, one constant learning rate
(the notebook's runs end long before its first milestone), and ImageNet's mean and standard
deviation.
"""

from ml_collections import ConfigDict, config_dict

from rezero_jax.config import base_config, optim_group, parse_arg
from rezero_jax.devices import default_cpu_devices
from rezero_jax.errors import check_choice

MEAN_STD = {  # per channel, the numbers that each recipe uses for CIFAR-10
    "paper": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "notebook": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "depth=56,residual=rezero,recipe=paper"."""
    args = parse_arg(
        arg,
        family="cifar",
        depth=20,
        residual="rezero",
        batch_norm=True,
        recipe="paper",
        dataset="cifar10",
        lr=0.1,
        epochs=float,
        smoke=False,
    )
    check_choice("recipe", args.recipe, MEAN_STD)
    paper, cifar = args.recipe == "paper", args.family == "cifar"
    config = base_config()
    config.model.name = "resnet"
    config.model.family = args.family  # cifar: post-activation, 6n + 2 layers; preact: 18, 34, 50
    config.model.depth = 8 if args.smoke and cifar else 18 if args.smoke else args.depth
    config.model.residual = args.residual
    config.model.width = 4 if args.smoke else 16 if cifar else 64
    config.model.batch_norm = args.batch_norm
    config.model.variant = args.recipe  # cifar: see ResNet.cifar
    config.model.stem = "cifar"  # preact: cifar or imagenet
    config.model.alpha_init = config_dict.placeholder(float)  # unset: 0
    config.model.scan = False
    config.model.remat = "none"
    config.model.dtype = "float32"  # bfloat16 is slower by the TPU compiler's estimate

    config.data.name = "digits" if args.smoke else args.dataset
    if config.data.name == "cifar10":
        config.data.mean, config.data.std = MEAN_STD[args.recipe]
    config.data.crop_padding = 4
    config.data.flip = config.data.name.startswith("cifar")  # mirrored digits are not digits

    config.train.epochs = args.epochs or (1.0 if args.smoke else 200.0 if paper else 2.0)
    config.train.steps_per_dispatch = 10

    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.learning_rate = args.lr
    config.optim.weight_decay = 5e-4 if paper else 1e-4
    config.optim.schedule = "multistep" if paper else "constant"  # epochs 100 and 150 of 200
    config.optim.alpha.weight_decay = None  # that of the weights, unlike in base_config
    if paper:
        config.optim.groups.bias = optim_group(
            path=r"bias|/(entry|blocks|\d+)/scale$",  # Fixup's scale, not BatchNorm's
            learning_rate=args.lr / 10,
            milestones=(0.5,),
            decay_factor=0.01,
        )

    config.mesh.cpu_devices = default_cpu_devices()

    config.eval.every_epochs = 1.0
    config.checkpoint.every_steps = 200
    config.log.every_steps = 10
    return config
