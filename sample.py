"""Writes text with a trained Transformer: `python sample.py --workdir=DIR`; see --help."""

import codecs
import itertools
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launch.interrupt import end_on_interrupt

if TYPE_CHECKING:
    from rezero_jax.models.transformer.model import Transformer

EXAMPLES = """\
examples:
  train a small model on the sources of Python's standard library, and let it write:
    python train.py --config=configs/transformer_small.py --workdir=runs/stdlib
    python sample.py --workdir=runs/stdlib --prompt="def main("
  the likeliest bytes, one after another:
    python sample.py --workdir=runs/stdlib --prompt="import " --temperature=0
  fewer surprises:
    python sample.py --workdir=runs/stdlib --prompt="class " --temperature=0.7 --top_p=0.9

exit status: 0 done; 2 a mistake in the command or the workdir; 130 stopped by Ctrl-C.
"""


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    import argparse

    parser = argparse.ArgumentParser(
        description="Writes text with the newest checkpoint of a run, byte by byte.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--prompt", default="\n", help="what to continue; default: a new line")
    parser.add_argument("--bytes", type=int, default=500, help="how many to write; default 500")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest byte; default 0.8"
    )
    parser.add_argument("--top_k", type=int, help="choose among this many of the likeliest bytes")
    parser.add_argument(
        "--top_p", type=float, help="choose among the likeliest that together have this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices; default 0")
    args = parser.parse_args(argv)
    if not args.workdir:
        parser.error("--workdir= is empty (an unset variable?); name the run's folder")

    from flax import nnx

    from rezero_jax.devices import cache_compilations
    from rezero_jax.errors import UserError
    from rezero_jax.training.load import load_language_model

    try:
        if not args.prompt:
            raise UserError("--prompt is empty; give at least one character to continue from")
        if args.bytes < 1:
            raise UserError(f"--bytes={args.bytes} asks for nothing; give at least 1")
        cache_compilations()
        model, step = load_language_model(args.workdir)
        prompt = args.prompt.encode(errors="surrogateescape")  # the bytes that were typed
        written = write(
            model,
            prompt,
            args.bytes,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            rngs=nnx.Rngs(args.seed),
        )
        # A character may take several bytes, and a young model writes bytes that are none.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        first = next(written)  # here a wrong option shows, before anything is said
        print(f"{args.workdir} after {step:,} updates:\n", file=sys.stderr)
        for some in itertools.chain([prompt + first], written):
            print(decoder.decode(some), end="", flush=True)
        print(decoder.decode(b"", final=True))
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 128 + signal.SIGINT
    return 0


def write(model: "Transformer", prompt: bytes, count: int, **options: Any) -> Iterator[bytes]:
    """`count` bytes that continue the prompt, some at a time.

    Where max_len has no room for all, it continues from the last max_len / 2 bytes, repeatedly.
    The options are those of `Transformer.generate`.
    """
    from rezero_jax.models.transformer.generate import stream

    text, half = prompt, max(model.max_len // 2, 1)
    while count > 0:
        known = text if len(text) + count <= model.max_len else text[-half:]
        room = min(count, model.max_len - len(known))
        for tokens in stream(model, [list(known)], room, **options):
            some = bytes(tokens[0].tolist())
            text += some
            count -= len(some)
            yield some


if __name__ == "__main__":
    end_on_interrupt("sample.py")
    sys.exit(main(sys.argv[1:]))
