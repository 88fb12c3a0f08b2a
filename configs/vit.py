"""Vision Transformers on CIFAR-10; not an experiment of the paper.

    python train.py --config=configs/vit.py:depth=6,residual=rezero --workdir=runs/vit
        6 layers of width 192 on patches of 4 x 4 pixels for 100 epochs; for accelerators.
        residual=pre_norm is the published ViT; post_norm, gpt2_norm, layerscale and the other rules
        work too. We have no result at full length yet

    python train.py --config=configs/vit.py:dataset=digits,epochs=30 --workdir=...
        scikit-learn's digits, patches of 2 x 2 pixels; minutes on 2 cores

Images are padded, cropped and flipped. The head takes the mean over the patches, because a class
token would contain no pixels while all gates are 0. Two runs of a comparison differ only in
`model.residual` and in the final norm, which only `pre_norm` has. AdamW decays only matrices.
"""

from ml_collections import ConfigDict, config_dict

from rezero_jax.config import base_config, optim_group, option_fields, parse_arg
from rezero_jax.devices import default_cpu_devices
from rezero_jax.models.transformer.config import TransformerConfig


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "depth=12,residual=pre_norm"."""
    args = parse_arg(
        arg, residual="rezero", depth=6, dataset="cifar10", lr=0.001, epochs=100.0, smoke=False
    )
    config = base_config()
    config.data.name = "digits" if args.smoke else args.dataset
    digits = config.data.name == "digits"
    config.data.crop_padding = 1 if digits else 4
    config.data.flip = config.data.name.startswith("cifar")  # mirrored digits are not digits

    config.model = option_fields(TransformerConfig(activation="gelu"))
    config.model.name = "vit"
    config.model.patch = 2 if digits else 4
    config.model.width = 16 if args.smoke else 192
    config.model.depth = 2 if args.smoke else args.depth
    config.model.heads = 2 if args.smoke else 3
    config.model.residual = args.residual
    config.model.pool = "mean"  # token, mean
    # Unset: present if the rule (which the command may override) normalises the branch alone.
    config.model.final_norm = config_dict.placeholder(bool)
    # On a CPU, unrolling 12 layers saves a fifth of the time, but deep stacks compile slowly.
    config.model.scan = args.depth > 16
    config.model.remat = "none"
    config.model.dtype = "auto"

    config.train.epochs = 1.0 if args.smoke else args.epochs
    config.train.steps_per_dispatch = 10

    config.optim.name = "adamw"
    config.optim.learning_rate = args.lr
    config.optim.weight_decay = 0.05
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 5 if args.smoke else 100 if digits else 1000
    config.optim.clip_norm = 1.0
    config.optim.groups.vectors = optim_group(path="bias|norm|position|token", weight_decay=0.0)

    config.mesh.cpu_devices = default_cpu_devices()

    config.eval.every_epochs = 1.0
    config.checkpoint.every_steps = 200
    config.log.every_steps = 10
    return config
