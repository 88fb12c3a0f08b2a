"""The paper's language models on enwik8 (section 5; supplement B and C), for accelerators.

    python train.py --config=configs/transformer_enwik8.py:depth=12,residual=rezero --workdir=...
        38 million parameters. The paper reaches 1.2 bits per byte on the validation split after
        8,800 updates, and 1.17 on the test split at the end

    ...:depth=12,residual=post_norm,warmup=100
        the baselines, with the paper's updates to the same target: post_norm with warm-up 13,690,
        without warm-up never; pre_norm 17,765; gpt2_norm 21,187; rezero,alpha_init=1 14,506

    ...:depth=64 and ...:depth=128
        51 and 101 million parameters; 1.11 and 1.08 bits per byte on the test split in the paper

    python train.py --mode=eval --workdir=... --config.data.eval_split=test
        the bits per byte on the test split

The models have width 512 (256 from 64 layers on), 2 heads, 512 bytes, GELU and dropout 0.2. LAMB
has a constant learning rate: 0.016 for the batch of 1,080, and 0.0005 sqrt(batch) for the batches
of 304 and 144. The paper used eight GPUs. Here one device with 80 GB computes a batch in
`accumulate` microbatches (not tried); eight devices need an eighth of them, and a known GPU takes
the fewest that fit in its memory, without rematerialisation if possible.

The paper does not state these choices:
- a feed-forward of 4 times the width, which gives the paper's parameter counts except the 34
  million of its 12-layer ReZero networks;
- 2 heads at width 256, too;
- sinusoidal positions and the embedding's distribution, both from the authors' notebook;
- dropout after the embedding, and no final norm for any rule;
- LAMB with Adam's bias correction and without a bound on the norm of the weights;
- 130 epochs at 12 layers, the length of the paper's slowest run.
"""

from ml_collections import ConfigDict

from rezero_jax.config import base_config, parse_arg
from rezero_jax.errors import choose_from
from rezero_jax.models.build import transformer_model

BATCH = {12: 1080, 64: 304, 128: 144}
ACCUMULATE = {12: 9, 64: 4, 128: 4}


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`, such as "depth=64,residual=rezero"."""
    args = parse_arg(
        arg,
        depth=12,
        residual="rezero",
        alpha_init=float,
        warmup=0,
        accumulate=int,
        epochs=float,
        smoke=False,
    )
    if args.depth not in BATCH:
        raise choose_from("number of layers", args.depth, map(str, BATCH))
    deep, batch = args.depth > 12, BATCH[args.depth]
    config = base_config()
    config.model = transformer_model()
    config.model.residual = args.residual
    config.model.alpha_init = args.alpha_init
    config.model.depth = 2 if args.smoke else args.depth
    config.model.width = 16 if args.smoke else 256 if deep else 512
    config.model.heads = 2
    config.model.max_len = 8 if args.smoke else 512
    config.model.dropout = 0.2
    config.model.remat = "full" if deep else "none"

    config.data.name = "stdlib" if args.smoke else "enwik8"
    config.data.length = config.model.max_len

    config.train.epochs = args.epochs or (100.0 if deep else 130.0)
    if args.smoke and not args.epochs:
        config.train.epochs, config.train.steps = None, 50
    config.train.batch_size = 16 if args.smoke else batch
    config.train.accumulate = args.accumulate or (2 if args.smoke else ACCUMULATE[args.depth])
    config.train.steps_per_dispatch = 5

    config.optim.name = "lamb"
    config.optim.learning_rate = 0.0005 * batch**0.5 if deep else 0.016
    config.optim.warmup_steps = args.warmup

    config.eval.every_epochs = None if args.smoke else 1.0
    config.eval.examples = 240 if args.smoke else None
    config.eval.batch_size = 80
    config.checkpoint.every_steps = 500
    config.log.every_steps = 10
    return config
