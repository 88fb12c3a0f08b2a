"""The language models of the authors' notebook, with 12 to 128 layers or more, on bytes.

    python train.py --config=configs/transformer_notebook.py:depth=128 --workdir=runs/deep
        128 ReZero layers on the sources of Python's standard library, at several seconds per update
        on a CPU

    ...:depth=128,residual=post_norm
        the post-norm baseline, which does not learn at this depth

    ...:path=book.txt
        your own text, a file or a folder

Batches have 50 rows of 35 bytes. The learning rate of Adagrad starts at 0.01 and drops by a tenth
after each of 3 epochs, or each third of steps=N updates. The notebook trains on words of
WikiText-2, so its perplexities are not comparable. As in the notebook, pre_norm has no final norm.
Unlike in the notebook, the two LayerNorms of a layer are not shared.
"""

from ml_collections import ConfigDict

from rezero_jax.config import base_config, parse_arg
from rezero_jax.devices import default_cpu_devices
from rezero_jax.models.build import transformer_model


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "depth=128,residual=post_norm"."""
    args = parse_arg(arg, depth=12, residual="rezero", path=str, epochs=3, steps=int, smoke=False)
    steps = args.steps or (50 if args.smoke else None)
    config = base_config()
    config.model = transformer_model()
    config.model.residual = args.residual
    config.model.depth = 2 if args.smoke else args.depth
    config.model.width = 16 if args.smoke else 128
    config.model.heads = 8
    config.model.feedforward = 256
    config.model.max_len = 35
    config.model.activation = "relu"
    config.model.dropout = 0.1

    config.data.name = "text" if args.path else "stdlib"
    config.data.path = args.path
    config.data.length = 35

    config.train.epochs = None if steps else float(args.epochs)
    config.train.steps = steps
    config.train.batch_size = 16 if args.smoke else 50
    config.train.steps_per_dispatch = 5

    config.optim.name = "adagrad"
    config.optim.learning_rate = 0.01
    config.optim.schedule = "multistep"
    config.optim.milestones = tuple(epoch / args.epochs for epoch in range(1, args.epochs))
    config.optim.decay_factor = 0.9
    config.optim.clip_norm = 0.5

    config.mesh.cpu_devices = min(default_cpu_devices(), 2)  # a divisor of 50

    config.eval.every_epochs = None if steps else 1.0
    config.eval.examples = 500 if args.smoke else None
    config.eval.batch_size = 500
    config.checkpoint.every_steps = 200
    config.log.every_steps = 5
    return config
