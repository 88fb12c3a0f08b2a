"""The command line that writes text: its output, the runs it reads, the commands it refuses."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

import rezero_jax
import sample
from rezero_jax.errors import UserError
from rezero_jax.models.transformer import generate
from rezero_jax.models.transformer.score import bits_per_byte
from rezero_jax.runs.workdir import Workdir
from rezero_jax.training.load import load_language_model
from tests.families import STEPS, refused


@pytest.fixture(scope="module")
def workdir(trained):
    return trained("transformer")


@pytest.fixture(scope="module")
def model(workdir):
    return load_language_model(workdir)[0]


def run(capsys, workdir, *flags):
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    status = sample.main([f"--workdir={workdir}", *flags])
    return status, *capsys.readouterr()


@jax.jit
def forward(model, tokens):
    return model(tokens)


def likeliest(model, text, count):
    """`count` bytes after the text, each by a call of the model without a cache."""
    longest = model.max_len
    window = text if len(text) < longest else text[-longest // 2 :]
    for _ in range(count):
        if len(window) == longest:
            window = window[-longest // 2 :]
        padded = jnp.asarray([[*window, *[0] * (longest - len(window))]])
        byte = bytes([int(forward(model, padded)[0, len(window) - 1].argmax())])
        text, window = text + byte, window + byte
    return text


def test_the_likeliest_bytes_continue_a_prompt_beyond_the_length_of_the_model(
    capsys, workdir, model
):
    for prompt, count in (("def", 1), ("def", 21), ("a prompt longer than the model", 3)):
        flags = (f"--prompt={prompt}", f"--bytes={count}", "--temperature=0")
        status, out, err = run(capsys, workdir, *flags)
        assert (status, err) == (0, f"{workdir} after {STEPS} updates:\n\n")
        written = likeliest(model, prompt.encode(), count)
        assert len(written) == len(prompt) + count
        assert out == written.decode(errors="replace") + "\n"
    for flags in (("--top_k=1",), ("--top_p=0.000001",)):
        _, out, _ = run(capsys, workdir, "--prompt=so", "--bytes=12", *flags)
        assert out == likeliest(model, b"so", 12).decode(errors="replace") + "\n"


def test_the_seed_determines_exactly_the_requested_bytes(capsys, workdir, model):
    options = {"temperature": 5.0, "top_k": None, "top_p": None}
    [new] = np.asarray(model.generate([list("é".encode())], 30, **options, rngs=nnx.Rngs(7)))
    written = bytes(new.tolist())
    flags = ("--prompt=é", "--bytes=30", "--temperature=5")
    status, out, _ = run(capsys, workdir, *flags, "--seed=7")
    assert (status, out) == (0, "é" + written.decode(errors="replace") + "\n")
    assert run(capsys, workdir, *flags, "--seed=4")[1] != out
    default = run(capsys, workdir, "--bytes=10")[1]
    assert default.startswith("\n")  # the default prompt
    assert run(capsys, workdir, "--bytes=10", "--seed=0", "--temperature=0.8")[1] == default


def test_prompts_and_output_may_be_any_bytes(capsys, workdir, monkeypatch):
    """A character may come in several chunks, and bytes may be no character."""
    given, pieces = [], [b"\xa9!\xe2", b"\x82\xac \xff", b"\xc3"]

    def stream(model, prompts, count, **options):
        given.extend(map(bytes, prompts))
        yield from (np.frombuffer(piece, np.uint8)[None] for piece in pieces)

    monkeypatch.setattr(generate, "stream", stream)
    flag = b"\xff\xc3".decode(errors="surrogateescape")  # as Python reads a command line
    assert run(capsys, workdir, f"--prompt={flag}")[1] == "\ufffdé!€ \ufffd\ufffd\n"
    assert given == [b"\xff\xc3"]


@pytest.mark.parametrize("count", [2, 40])
def test_a_text_is_scored_byte_by_byte(count, capsys, workdir, model, tmp_path):
    """Each byte is predicted from as many bytes before it as the overlapping windows have."""
    text = bytes(np.random.default_rng(0).integers(0, 256, count).tolist())
    length, step = model.max_len, model.max_len // 2
    bits = 0.0
    for place in range(1, count):
        start = max(0, -(-(place - length) // step)) * step
        logits = forward(model, jnp.asarray([list(text[start:place])]))[0, -1]
        bits -= float(jax.nn.log_softmax(logits)[text[place]]) / np.log(2)
    expected = bits / (count - 1)
    assert bits_per_byte(model, text) == pytest.approx(expected, rel=1e-5)
    (tmp_path / "text").write_bytes(text)
    status, out, _ = run(capsys, workdir, f"--score={tmp_path / 'text'}", f"--step={STEPS}")
    assert (status, out) == (
        0,
        f"{workdir} after {STEPS} updates: {expected:.4f} bits per byte of {tmp_path / 'text'}\n",
    )


def test_an_exported_model_writes_like_its_run_and_continues_a_file(
    capsys, workdir, model, tmp_path
):
    rezero_jax.save(model, tmp_path / "out")
    (tmp_path / "prompt").write_text("def")
    flags = (f"--prompt_file={tmp_path / 'prompt'}", "--bytes=7")
    status, out, err = run(capsys, tmp_path / "out", *flags)
    assert (status, err) == (0, f"{tmp_path / 'out'}:\n\n")
    assert out == run(capsys, workdir, "--prompt=def", "--bytes=7")[1]
    assert run(capsys, tmp_path / "out", "--step=1")[0] == 2


def contents(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def test_a_run_in_use_can_be_sampled_and_nothing_changes(capsys, copy_of):
    folder = copy_of("transformer", STEPS)
    config = ConfigDict(json.loads((folder / "config.json").read_text()))
    held = Workdir(folder, config)
    (folder / "checkpoints" / f"{STEPS + 2}.orbax-checkpoint-tmp").mkdir()  # half-written
    before = contents(folder)
    status, _, err = run(capsys, folder, "--bytes=5")
    assert (status, err) == (0, f"{folder} after {STEPS} updates:\n\n")
    assert contents(folder) == before
    with pytest.raises(UserError, match="another process"):
        Workdir(folder, config)
    held.release()


def test_a_wrong_option_is_one_sentence(capsys, workdir):
    for flag, words in (
        ("--prompt=", "prompt"),
        ("--prompt_file=nowhere", "nowhere"),
        ("--score=nowhere", "nowhere"),
        ("--step=3", "checkpoint 3"),
        (f"--score={os.devnull}", "0 byte"),
        ("--bytes=0", "--bytes=0"),
        ("--seed=99999999999999999999", "--seed=99999999999999999999"),
        ("--temperature=nan", "temperature=nan"),
        ("--top_k=0", "top_k=0"),
        ("--top_p=2", "top_p=2.0"),
    ):
        status, out, err = run(capsys, workdir, flag)
        assert (status, out) == (2, "")
        [line] = err.splitlines()  # and nothing is announced
        assert line.startswith("sample.py: ")
        assert words in line
    for flag in ("--prmpt=y", "--workdir="):
        with pytest.raises(SystemExit, match="2"):
            sample.main([f"--workdir={workdir}", flag])


def test_folders_without_a_checkpoint_of_a_transformer(capsys, workdir, tmp_path):
    young = tmp_path / "young"
    assert "no run" in run(capsys, young)[2]
    assert not young.exists()
    (young / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    refused(lambda: load_language_model(young), "no run")
    shutil.copy(workdir / "config.json", young)
    refused(lambda: load_language_model(young), "no good checkpoint")
    config = json.loads((young / "config.json").read_text())
    config["model"]["name"] = "mlp"
    (young / "config.json").write_text(json.dumps(config))
    refused(lambda: load_language_model(young), "mlp, not a transformer")


def test_ctrl_c_ends_it_with_130(capsys, workdir, monkeypatch):
    def stream(*args, **options):
        yield np.array([[ord("b")]])
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", stream)
    assert run(capsys, workdir, "--prompt=a")[:2] == (130, "ab\n")
