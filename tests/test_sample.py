"""The command line that writes text: what it writes, what it reads, what it refuses."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from ml_collections import ConfigDict

import sample
import train
from rezero_jax.errors import UserError
from rezero_jax.models.transformer import generate
from rezero_jax.runs.folder import Workdir
from rezero_jax.training.load import load_language_model

ROOT = Path(__file__).parents[1]
MAX_LEN = 8


def train_small(workdir, book, *flags):
    """The exit status of the command that trains the smallest model there is."""
    return train.main(
        [
            f"--config={ROOT / 'configs/transformer_small.py'}:smoke,path={book},steps=30",
            f"--workdir={workdir}",
            "--config.mesh.cpu_devices=none",
            "--config.mesh.data=1",
            "--config.eval.batch_size=8",
            "--config.checkpoint.every_steps=20",
            "--config.optim.learning_rate=0.02",
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a finished run of 30 updates, saved after 20 of them too."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("sing a song of sixpence, a pocket full of rye; " * 40)
    assert train_small(folder / "run", folder / "book.txt") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model(workdir):
    return load_language_model(workdir)[0]


def run(capsys, workdir, *flags):
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    status = sample.main([f"--workdir={workdir}", *flags])
    return status, *capsys.readouterr()


def likeliest(model, text, count):
    """`count` bytes after the text, each by a call of the model without a cache."""
    forward = jax.jit(lambda tokens: model(tokens))
    window = text if len(text) + count <= MAX_LEN else text[-MAX_LEN // 2 :]
    for _ in range(count):
        if len(window) == MAX_LEN:
            window = window[-MAX_LEN // 2 :]
        padded = jnp.asarray([[*window, *[0] * (MAX_LEN - len(window))]])
        byte = bytes([int(forward(padded)[0, len(window) - 1].argmax())])
        text, window = text + byte, window + byte
    return text


# ---- The model


def test_the_model_is_that_of_the_newest_checkpoint(workdir, model):
    with ocp.StandardCheckpointer() as checkpointer:
        older, newest = (
            checkpointer.restore(workdir / "checkpoints" / step / "state")["params"]
            for step in ("20", "30")
        )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for mine, new, old in zip(*map(jax.tree.leaves, (params, newest, older)), strict=True):
        np.testing.assert_array_equal(mine, new)
        assert not np.array_equal(mine, old)
    assert load_language_model(workdir)[1] == 30
    assert model.dropout.deterministic


# ---- What is written


@pytest.mark.parametrize("count", [1, 5, 6, 21])
def test_the_likeliest_bytes_go_on_beyond_the_length_of_the_model(capsys, workdir, model, count):
    flags = ("--prompt=son", f"--bytes={count}", "--temperature=0")
    status, out, err = run(capsys, workdir, *flags)
    assert (status, err) == (0, f"{workdir} after 30 updates:\n\n")
    expected = likeliest(model, b"son", count)
    assert len(expected) == 3 + count
    assert out == expected.decode() + "\n"


def test_a_long_prompt_is_written_whole_and_its_end_is_gone_on_from(capsys, workdir, model):
    prompt = "sixpence, a pocket full"
    status, out, _ = run(capsys, workdir, f"--prompt={prompt}", "--bytes=3", "--temperature=0")
    assert status == 0
    assert out == prompt + likeliest(model, b"full", 3)[4:].decode() + "\n"


@pytest.mark.parametrize(
    ("prompt", "count", "asked"),
    [
        (b"abc", 5, [(b"abc", 5)]),
        (b"abc", 6, [(b"abc", 5), (b"1234", 1)]),
        (b"abc", 12, [(b"abc", 5), (b"1234", 4), (b"5678", 3)]),
        (b"abcdefgh", 2, [(b"efgh", 2)]),
        (b"abcdefghi", 7, [(b"fghi", 4), (b"0123", 3)]),
    ],
)
def test_it_goes_on_from_the_last_half_where_there_is_no_room(monkeypatch, prompt, count, asked):
    seen, digits = [], iter(range(ord("0"), ord("0") + count))

    def stream(model, prompts, room, **options):
        seen.append((bytes(*prompts), room))
        for start in range(0, room, 3):
            yield np.array([[next(digits) for _ in range(min(3, room - start))]])

    monkeypatch.setattr(generate, "stream", stream)
    written = b"".join(sample.write(SimpleNamespace(max_len=8), prompt, count))
    assert seen == asked
    assert written == bytes(range(ord("0"), ord("0") + count))


@pytest.mark.parametrize("count", [1, 8, 9, 30])
def test_just_so_many_bytes_are_written_whatever_they_are(capsys, workdir, model, count):
    options = {"temperature": 5.0, "top_k": None, "top_p": None}
    chunks = list(sample.write(model, "é".encode(), count, **options, rngs=nnx.Rngs(7)))
    written = b"".join(chunks)
    assert len(written) == count
    flags = ("--prompt=é", f"--bytes={count}", "--temperature=5", "--seed=7")
    status, out, _ = run(capsys, workdir, *flags)
    assert (status, out) == (0, "é" + written.decode(errors="replace") + "\n")


def test_characters_of_several_bytes_are_put_together_from_chunks(capsys, workdir, monkeypatch):
    pieces = [b"\xe2", b"\x82\xac \xff", b"\xc3"]
    monkeypatch.setattr(sample, "write", lambda *args, **options: iter(pieces))
    _, out, _ = run(capsys, workdir, "--prompt=5 ")
    assert out == "5 € \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\n"


def test_a_prompt_may_be_bytes_that_are_no_text(capsys, workdir, monkeypatch):
    prompts = []

    def write(model, prompt, count, **options):
        prompts.append(prompt)
        yield b"\xa9!"

    monkeypatch.setattr(sample, "write", write)
    typed = b"\xff\xc3".decode(errors="surrogateescape")  # as Python reads a command line
    _, out, _ = run(capsys, workdir, f"--prompt={typed}")
    assert prompts == [b"\xff\xc3"]
    assert out == "\N{REPLACEMENT CHARACTER}é!\n"


def test_the_seed_decides_the_text(capsys, workdir):
    def text(*flags):
        return run(capsys, workdir, "--bytes=40", *flags)[1]

    first = text("--seed=3")
    assert first.startswith("\n")  # the default prompt
    assert text("--seed=3") == first
    assert text("--seed=4") != first
    assert text() == text("--seed=0")


@pytest.mark.parametrize("flags", [("--top_k=1",), ("--top_p=0.000001",)])
def test_the_narrowest_choice_writes_the_likeliest_bytes(capsys, workdir, model, flags):
    _, out, _ = run(capsys, workdir, "--prompt=so", "--bytes=12", *flags)
    assert out == likeliest(model, b"so", 12).decode() + "\n"


# ---- What is read


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def test_a_run_in_use_can_be_sampled_and_nothing_changes(capsys, workdir):
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    held = Workdir(workdir, config)
    half_written = workdir / "checkpoints" / "40.orbax-checkpoint-tmp"
    half_written.mkdir()
    before = contents(workdir)
    status, _, err = run(capsys, workdir, "--bytes=5")
    assert (status, err) == (0, f"{workdir} after 30 updates:\n\n")
    assert contents(workdir) == before
    assert len(before) > 10
    with pytest.raises(UserError, match="another process is training"):
        Workdir(workdir, config)
    half_written.rmdir()
    del held


def test_an_evaluation_may_ask_for_more_context_and_the_test_split(capsys, workdir):
    book, numbers, before = workdir.parent / "book.txt", [], contents(workdir)
    for flags in ((), ("--config.data.context=7", "--config.data.eval_split=test")):
        capsys.readouterr()
        assert train_small(workdir, book, "--mode=eval", *flags) == 0
        numbers.append(json.loads(capsys.readouterr().out))
    final = json.loads((workdir / "final.json").read_text())
    assert numbers[0] == {"step": 30} | {
        key: final[key] for key in ("eval/loss", "eval/bits_per_byte")
    }
    assert numbers[1]["eval/bits_per_byte"] < numbers[0]["eval/bits_per_byte"]
    changed = {path for path, content in contents(workdir).items() if before[path] != content}
    assert changed <= {Path(".lock")}


# ---- What is refused


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--prompt=",), "--prompt is empty; give at least one character to continue from"),
        (("--bytes=0",), "--bytes=0 asks for nothing; give at least 1"),
        (("--temperature=-1",), "temperature=-1.0 is not 0 or more; 0 picks the likeliest token"),
        (("--temperature=nan",), "temperature=nan is not 0 or more; 0 picks the likeliest token"),
        (("--top_k=0",), "top_k=0 leaves no token; give at least 1"),
        (("--top_p=2",), "top_p=2.0 is no probability; give one above 0, at most 1"),
    ],
)
def test_a_wrong_option_is_one_sentence(capsys, workdir, flags, sentence):
    status, out, err = run(capsys, workdir, *flags)
    assert (status, out) == (2, "")
    assert err == f"sample.py: {sentence}\n"  # and no announcement


def refused(capsys, workdir):
    status, out, err = run(capsys, workdir)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    return line.replace(str(workdir), "DIR")


def test_a_folder_without_a_run_or_a_checkpoint_of_a_transformer_is_told(capsys, workdir, tmp_path):
    none = "sample.py: DIR holds no run: there is no config.json in it; train there first"
    assert refused(capsys, tmp_path / "nowhere") == none
    assert not (tmp_path / "nowhere").exists()
    young = tmp_path / "young"
    young.mkdir()
    assert refused(capsys, young) == none
    shutil.copy(workdir / "config.json", young)
    wait = "sample.py: DIR holds no checkpoint yet; wait for the first, or train there"
    assert refused(capsys, young) == wait
    (young / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    assert refused(capsys, young) == wait
    config = json.loads((young / "config.json").read_text())
    config["model"]["name"] = "mlp"
    (young / "config.json").write_text(json.dumps(config))
    assert refused(capsys, young) == (
        "sample.py: DIR holds a run of model.name=mlp, which writes no text; choose one of a "
        "transformer"
    )


def test_a_damaged_checkpoint_is_told_and_left(capsys, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "30" / "state" / "_METADATA").unlink()
    before = contents(tmp_path / "run")
    status, _, err = run(capsys, tmp_path / "run", "--bytes=2")
    assert status == 0
    warning, *rest = err.splitlines()
    assert warning.startswith("warning: checkpoint 30 is damaged (")
    assert warning.endswith("); using the one before it")
    assert " after 20 updates:" in rest[0]
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / "checkpoints" / "20" / "state" / "_METADATA").unlink()
    before = contents(tmp_path / "run")
    status, _, err = run(capsys, tmp_path / "run", "--bytes=2")
    assert status == 2
    assert "holds no good checkpoint; train there, or name another run" in err.splitlines()[-1]
    assert contents(tmp_path / "run") == before


def test_ctrl_c_ends_it_with_130(capsys, workdir, monkeypatch):
    def write(*args, **options):
        yield b"b"
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "write", write)
    assert run(capsys, workdir, "--prompt=a")[:2] == (130, "ab\n")


def test_help_has_examples_that_are_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as info:
        sample.main(["--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert "exit status: 0 done; 2 a mistake" in out
    commands = [shlex.split(line) for line in re.findall(r"^    python (.*)$", out, re.MULTILINE)]
    assert [command[0] for command in commands].count("sample.py") == 3
    for program, *flags in commands:
        if program == "train.py":
            assert (ROOT / flags[0].removeprefix("--config=")).is_file()
        else:
            assert sample.main(flags) == 2  # for there is no such run
            assert "runs/stdlib holds no run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as info:
        sample.main(["--workdir=x", "--prmpt=y"])
    assert info.value.code == 2
