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
  how well the model of an older checkpoint predicts a file:
    python sample.py --workdir=runs/stdlib --step=500 --score=train.py
  nucleus sampling at a lower temperature:
    python sample.py --workdir=runs/stdlib --prompt="class " --temperature=0.7 --top_p=0.9

exit status: 0 done; 2 an error in the command or the run folder; 4 storage was unavailable, try
again; 130 stopped by Ctrl-C.
"""


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    summary = "Writes text with a language model, byte by byte, or scores a text."
    parser = command.parser("sample.py", summary, EXAMPLES)
    text = "the folder of a run or of an exported model"
    parser.add_argument("--workdir", required=True, type=command.path, metavar="DIR", help=text)
    text = "file to score instead of writing: prints its bits per byte"
    parser.add_argument("--score", type=command.path, metavar="FILE", help=text)
    text = "file with the text to continue, instead of --prompt"
    parser.add_argument("--prompt_file", type=command.path, metavar="FILE", help=text)
    for name, kind, default, text in (
        ("step", int, None, "checkpoint of the run (default: the newest one)"),
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
    return command.exit_status("sample.py", lambda: score_or_sample(**vars(args)))


def score_or_sample(
    workdir: str,
    allow: list[str],
    step: int | None,
    score: str | None,
    prompt: str,
    prompt_file: str | None,
    bytes: int,
    **options: Any,
) -> None:
    """Prints the bits per byte of the file `score`, or a sample; see `sample`."""
    from rezero_jax.devices import cache_compilations, check_platform
    from rezero_jax.models.transformer.score import bits_per_byte

    if (file := score or prompt_file) is not None:
        text = _content(file)
    else:
        text = prompt.encode(errors="surrogateescape")  # the bytes on the command line
    if not text and score is None:
        raise UserError("the prompt is empty; give at least one character to continue from")
    if bytes < 1:
        raise UserError(f"--bytes={bytes} asks for nothing; give at least 1")
    if not 0 <= options["seed"] < 2**32:
        raise UserError(f"--seed={options['seed']} is out of range; give 0 to {2**32 - 1}")
    cache_compilations()
    check_platform()
    model, steps = _load(workdir, allow, step)
    name = workdir if steps is None else f"{workdir} after {steps:,} updates"
    if score is None:
        sample(model, name, text, bytes, **options)
    else:
        print(f"{name}: {bits_per_byte(model, text):.4f} bits per byte of {score}")


def _load(workdir: str, allow: list[str], step: int | None) -> tuple[Any, int | None]:
    """A language model, and the updates of a run."""
    from rezero_jax import Transformer, load
    from rezero_jax.runs.files import path_of
    from rezero_jax.training.load import load_language_model

    if not (path_of(workdir) / "model.safetensors").exists():
        return load_language_model(workdir, allow, step)
    model = load(workdir, allow)
    if step is not None or not isinstance(model, Transformer):
        wrong = f"--step={step}" if step is not None else f"a {type(model).__name__}"
        raise UserError(f"{workdir} is an exported model, and has no {wrong}; name a run")
    return model, None


def _content(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); give another file") from None


def sample(model: Any, name: str, typed: bytes, count: int, seed: int, **options: Any) -> None:
    """Prints the prompt and `count` more bytes; `Transformer.generate` documents the options."""
    import numpy as np
    from flax import nnx

    from rezero_jax.models.transformer import generate

    new = generate.stream(model, [list(typed)], count, rngs=nnx.Rngs(seed), **options)
    written = (tokens[0].astype(np.uint8).tobytes() for tokens in new)
    first = next(written)  # raises for an invalid option, before anything is printed
    print(f"{name}:\n", file=sys.stderr)
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
