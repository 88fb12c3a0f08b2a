"""Writes text with a trained Transformer: `python sample.py --workdir=DIR`; see --help."""

import codecs
import contextlib
import itertools
import os
import re
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # absent with PYTHONSAFEPATH

from launch.interrupt import end_on_interrupt
from rezero_jax import command
from rezero_jax.errors import UserError, printable

EXAMPLES = """\
examples:
  train a small model on the sources of Python's standard library, and sample from it:
    python train.py --config=configs/transformer_small.py --workdir=runs/stdlib
    python sample.py --workdir=runs/stdlib --prompt="def main("
  greedy decoding:
    python sample.py --workdir=runs/stdlib --prompt="import " --temperature=0
  nucleus sampling at a lower temperature:
    python sample.py --workdir=runs/stdlib --prompt="class " --temperature=0.7 --top_p=0.9

exit status: 0 done; 2 an error in the command or the run folder; 4 storage was unavailable, try
again; 130 stopped by Ctrl-C.
"""


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    summary = "Writes text with the newest checkpoint of a run, byte by byte."
    parser = command.parser("sample.py", summary, EXAMPLES)
    parser.add_argument(
        "--workdir", required=True, type=command.path, metavar="DIR", help="the run's folder"
    )
    for name, kind, default, text in (
        ("prompt", str, "\n", "text to continue (default: a new line)"),
        ("bytes", int, 500, "number of bytes to write (default: 500)"),
        ("temperature", float, 0.8, "sampling temperature; 0 decodes greedily (default: 0.8)"),
        ("top_k", int, None, "number of likeliest bytes to sample from (default: all)"),
        ("top_p", float, None, "total probability of the bytes to sample from (default: 1)"),
        ("seed", int, 0, "seed of the sampling (default: 0)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    command.add_allow(parser)
    args = parser.parse_args(argv)
    with contextlib.suppress(FileNotFoundError):  # the current folder was deleted
        sys.path.append(os.getcwd())  # where the allowed modules are
    return command.exit_status("sample.py", lambda: sample(**vars(args)))


def sample(
    workdir: str, prompt: str, bytes: int, seed: int, allow: list[str], **options: Any
) -> None:
    """Prints the prompt and `bytes` more bytes; `Transformer.generate` documents the options."""
    import numpy as np
    from flax import nnx

    from rezero_jax.devices import cache_compilations, check_platform
    from rezero_jax.models.transformer import generate
    from rezero_jax.training.load import load_language_model

    if not prompt:
        raise UserError("--prompt is empty; give at least one character to continue from")
    if bytes < 1:
        raise UserError(f"--bytes={bytes} asks for nothing; give at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} is out of range; give 0 to {2**32 - 1}")
    cache_compilations()
    check_platform()
    model, step = load_language_model(workdir, allow)
    typed = prompt.encode(errors="surrogateescape")  # the bytes on the command line
    new = generate.stream(model, [list(typed)], bytes, rngs=nnx.Rngs(seed), **options)
    written = (tokens[0].astype(np.uint8).tobytes() for tokens in new)
    first = next(written)  # raises for an invalid option, before anything is printed
    print(f"{workdir} after {step:,} updates:\n", file=sys.stderr)
    # A character may span chunks, and a model may write bytes that are not UTF-8.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        for chunk in itertools.chain([typed + first], written):
            print(shown(decoder.decode(chunk)), end="", flush=True)
    finally:
        print(shown(decoder.decode(b"", final=True)))


def shown(text: str) -> str:
    """The text of a model, which on a terminal has no control characters but tab and new line."""
    if not sys.stdout.isatty():
        return text
    return re.sub(r"[^\n\t]+", lambda match: printable(match[0]), text)


if __name__ == "__main__":
    end_on_interrupt("sample.py")
    command.run(main, sys.argv[1:])
