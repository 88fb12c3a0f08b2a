"""Every mistake is one sentence, found before anything is written."""

import contextlib
import functools
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

import train
from rezero_jax import data, devices
from rezero_jax.config import flatten, load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.runs.workdir import Workdir
from rezero_jax.training import step
from rezero_jax.training.trainer import Trainer
from tests.families import ROOT, STEPS, TINY, command, config

MLP, VIT = "mlp.py:smoke", "vit.py:smoke"
RESNET = "resnet_superconvergence.py:smoke"
TEXT = "transformer_small.py:smoke"
EIGHT = pytest.mark.devices(8)


def argv(workdir, file=MLP, **fields):
    return command(file, workdir, **(TINY | fields))[2:]


def refusal(words, capsys):
    """The sentence with which train.py refuses the command line `words`."""
    assert train.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("train.py: ")
    return line


def listing(folder):
    files = {path.relative_to(folder): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in files.items()}


@functools.cache
def data_of(file):
    return data.load(config(file).data)


def check(file, fields):
    """Does what a run does with its config before it touches the workdir."""
    found = config(file, **(TINY | fields))
    if found.mesh.cpu_devices is not None and "mesh.cpu_devices" in fields:
        devices.set_cpu_devices(found.mesh.cpu_devices)
    changed = any(key.startswith("data.") for key in fields)
    Trainer(found, data.load(found.data, found.seed) if changed else data_of(file))


# Values that the sentence repeats as they are written here.
OUT_OF_RANGE = {
    "optim.learning_rate": ("-1.0",),
    "optim.warmup_steps": ("-1",),
    "optim.decay_factor": ("-1.0",),
    "optim.clip_norm": ("0.0",),
    "optim.b1": ("1.5",),
    "optim.b2": ("1.0",),
    "optim.momentum": ("-0.1",),
    "optim.weight_decay": ("-1.0",),
    "optim.milestones": ("(-0.5,)",),
    "seed": ("-1", "4294967296"),
    "data.jitter": ("-1.0",),
    "data.workers": ("-1",),
    "data.std": ("(0.0,)",),
    "train.batch_size": ("1438", "0"),
    "train.accumulate": ("3", "0"),
    "train.steps": ("-3",),
    "train.until_loss": ("-1.0",),
    "train.steps_per_dispatch": ("0", "1000000"),
    "eval.every_steps": ("-1",),
    "eval.batch_size": ("0", "2147483647"),
    "eval.examples": ("0",),
    "log.every_steps": ("0",),
    "checkpoint.every_steps": ("0",),
    "checkpoint.keep": ("0",),
    "checkpoint.keep_every_steps": ("0",),
    "checkpoint.keep_best": ("-1",),
    "mesh.cpu_devices": ("0", "100000"),
    "model.width": ("2147483647",),
}


@pytest.mark.guarantee("bad input")
@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_value_out_of_its_range(key):
    for value in OUT_OF_RANGE[key]:
        with pytest.raises(UserError, match=re.escape(f"{key}={value}")):
            check(MLP, {key: value})


@pytest.mark.guarantee("bad input")
@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        (MLP, {"optim.schedule": "piecewise", "optim.points": "(1.0, 2.0)"}, "optim.points"),
        (MLP, {"optim.schedule": "piecewise", "optim.points": "((0.0, -1.0),)"}, "optim.points"),
        (MLP, {"optim.name": "adam"}, "unknown optimizer"),
        (MLP, {"optim.alpha.name": "x"}, "unknown optimizer"),
        (MLP, {"optim.alpha.weight_decay": -1.0}, "weight_decay=-1.0"),
        (MLP, {"optim.schedule": "step"}, "unknown schedule"),
        (MLP, {"model.residual": "rezerro"}, 'unknown residual rule.*did you mean "rezero"'),
        (MLP, {"model.remat": "some"}, "remat"),
        (MLP, {"model.norm": "some"}, "norm"),
        (MLP, {"model.dtype": "float64"}, "dtype"),
        (MLP, {"model.name": "x"}, 'unknown model "x"'),
        (MLP, {"model.depth": 0}, "depth"),
        (MLP, {"model.base_depth": 0}, "base_depth"),
        (MLP, {"model.width": 0}, "width"),
        (MLP, {"model.weight_variance": -1.0}, "weight_variance"),
        (MLP, {"data.name": "cifar"}, 'unknown data set.*did you mean "cifar10"'),
        (MLP, {"train.steps": None}, "set train.steps"),
        (MLP, {"train.epochs": 2.0}, "train.steps and train.epochs"),
        (MLP, {"train.steps": None, "train.epochs": 1e30}, "more than 2147483647 updates"),
        (MLP, {"eval.every_epochs": 1.0}, "eval.every_steps and eval.every_epochs"),
        pytest.param(MLP, {"mesh.data": 9}, "mesh.data=9", marks=EIGHT),
        pytest.param(MLP, {"mesh.data": 3}, "mesh.data=3", marks=EIGHT),
        pytest.param(MLP, {"mesh.model": 3}, "mesh.model=3", marks=EIGHT),
        (RESNET, {"optim.momentum_points": "((0.0, 1.5),)"}, "optim.momentum_points"),
        (RESNET, {"data.crop_padding": -1}, "data.crop_padding=-1"),
        (RESNET, {"data.rotation": 1e9}, "data.rotation"),
        (RESNET, {"model.depth": 19}, "depth"),
        (TEXT, {"data.length": 0}, "data.length=0"),
        (TEXT, {"data.length": 2**31 - 1}, "data.length=2147483647"),
        (TEXT, {"data.context": 8}, "data.context=8"),
        (TEXT, {"model.dropout": 1.0}, "dropout"),
        (TEXT, {"model.heads": 3}, "heads"),
        (TEXT, {"model.max_len": 4}, "model.max_len=4"),
        (TEXT, {"model.vocab_size": 65}, "model.vocab_size=65"),
        (TEXT, {"model.vocab_size": 2**31 - 1}, "model.vocab_size"),
        (TEXT, {"data.name": "digits"}, "reads text"),
        (VIT, {"model.patch": 3}, "patch"),
        (VIT, {"model.width": -1}, "width"),
        (VIT, {"data.name": "stdlib"}, "reads images"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be(file, fields, words):
    with pytest.raises(UserError, match=words):
        check(file, fields)


ODD = ("[1, 2]", "[[0.5]]", "{}", "True", "None", "nan", "-inf", "1" + "0" * 400, "(0.5, None)", "")
BAD = {
    int: (-1, 0, 2**31 - 1, 2**40),
    float: (-1.0, "1e999", 1e39, 1e30),
    str: ("zzz",),
    tuple: ("(-1.0,)", "('a',)", "(1e999,)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", [MLP, "resnet.py:smoke", TEXT, VIT])
def test_any_value_of_any_field_makes_a_trainer_or_a_sentence(file):
    defaults = config(file)
    for key in flatten(defaults.to_dict()):
        *sections, last = key.split(".")
        section = functools.reduce(ConfigDict.get, sections, defaults)
        kind = section.get_type(last)
        for value in (*BAD.get(kind, ()), *(() if kind is str else ODD)):
            fields = {key: value} | ({"train.steps": None} if key.startswith("train.e") else {})
            with contextlib.suppress(UserError):
                check(file, fields)


def test_the_command_prints_one_sentence_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fields, words in (
        ({"train.stepz": 3}, "train.stepz"),
        ({"seed": "x"}, "config.seed takes a whole number"),
        ({"optim.b1": 1.5}, "optim.b1=1.5"),
        ({"mesh.cpu_devices": 0}, "mesh.cpu_devices=0"),
        ({"data.length": 10**9, "data.name": "cifar"}, "cifar10"),
        ({"model.width": 1_000_000}, "GB of memory"),
    ):
        assert words in refusal(argv(tmp_path / "run", **fields), capsys)
    for flags in (["--mode=eval"], ["--mode=eval", "--step=2"]):
        assert "checkpoint" in refusal([*argv(tmp_path / "run"), *flags], capsys)
    with pytest.raises(UserError, match="no run"):
        read_metrics(tmp_path)
    for flags in ([], ["--plan"]):
        with pytest.raises(SystemExit, match="2"):
            train.main([*argv(""), *flags])  # as an unset variable of the shell makes it
        assert "--workdir= is empty" in capsys.readouterr().err
    assert listing(tmp_path) == {}
    (tmp_path / "file").write_text("mine")
    assert "cannot write to the workdir" in refusal(argv(tmp_path / "file" / "run"), capsys)
    assert listing(tmp_path) == {Path("file"): b"mine"}


def test_a_config_that_cannot_be(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for spec, words in (
        ("configs/nowhere.py", "configs/nowhere.py"),
        ("configs/mpl.py", "configs/mlp.py"),
        ("configs/mlp.py:smoke,depht=3", '"depth"'),
        ("configs", "is a folder"),
        ("README.md", r"README.md failed \(SyntaxError: "),
    ):
        with pytest.raises(UserError, match=words):
            load_config(spec)
    nan = "from ml_collections import ConfigDict\n"
    nan += "def get_config(arg):\n    return ConfigDict({'rate': float('nan')})\n"
    for text, words in (
        ("def get_config(arg):\n    return {}\n", "returned a dict"),
        ("x = 1\n", "own.py .*get_config"),
        ("\nimport (\n", r"own.py .*SyntaxError: .*line 2"),
        ("x = 1\ny = x / 0\n", r"own.py, line 2, .*ZeroDivisionError: "),
        ("def get_config(arg):\n    return int('x')\n", r"own.py, line 2, .*ValueError: "),
        ("import sys\nsys.exit(0)\n", r"own.py, line 2, .*SystemExit: 0"),
        (nan, "rate=nan"),
    ):
        (tmp_path / "own.py").write_text(text)
        with pytest.raises(UserError, match=words):
            load_config(str(tmp_path / "own.py"))


def test_a_finished_run_of_another_config_or_without_a_file_is_refused(trained, tmp_path, capsys):
    run = shutil.copytree(trained("mlp"), tmp_path / "run")
    capsys.readouterr()
    before = listing(run)
    sentence = refusal(argv(run, **{"model.depth": 3, "seed": 5}), capsys)
    assert "model.depth: 4 -> 3; seed: 0 -> 5" in sentence
    assert listing(run) == before
    for name in ("config.json", "final.json"):
        good = (run / name).read_bytes()
        for content in (b"", b"[]", b"{", b"\xff"):
            (run / name).write_bytes(content)
            before = listing(run)
            assert f"{run / name} is broken (" in refusal(argv(run), capsys)
            assert listing(run) == before
        (run / name).write_bytes(good)
    (run / "checkpoints").rename(run / "moved")
    assert "checkpoints" in refusal(argv(run), capsys)
    (run / "moved").rename(run / "checkpoints")
    (run / "config.json").unlink()
    before = listing(run)
    assert "config.json" in refusal(argv(run), capsys)
    assert listing(run) == before


def test_an_evaluation_takes_the_config_of_the_run(trained, tmp_path, capsys):
    run = shutil.copytree(trained("mlp"), tmp_path / "run")
    words = ["--mode=eval", f"--workdir={run}"]
    last = {key: value for key, value in read_metrics(run)[-1].items() if key[:5] == "eval/"}
    capsys.readouterr()
    assert train.main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"step": STEPS} | last
    assert train.main([*words, "--step=4", "--config.eval.batch_size=50"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    change = "optim.learning_rate: 0.01 -> 0.5"
    assert change in refusal([*words, "--config.optim.learning_rate=0.5"], capsys)
    assert "holds no run" in refusal(["--mode=eval", f"--workdir={tmp_path}"], capsys)
    values = json.loads((run / "config.json").read_text())
    for section, fields, sentence in (
        ("data", {"name": "text", "path": "/etc/passwd"}, "give it as --config.data.path=PATH"),
        ("model", {"name": "own:Model"}, "allow it by --allow=own"),
    ):
        foreign = values | {section: values[section] | fields}
        (run / "config.json").write_text(json.dumps(foreign))
        assert sentence in refusal(words, capsys)
    for flags, sentence in (
        ([f"--workdir={run}"], "--config is missing"),
        ([*words, "--plan"], "--config is missing"),
        ([*argv(run), "--allow=own"], "--allow is for the config of a run to evaluate"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train.main(flags)
        assert sentence in capsys.readouterr().err


def test_a_run_killed_before_its_first_update_gives_way_to_another_config(tmp_path, capsys):
    Workdir(tmp_path, config(MLP, **TINY)).release()  # as if XLA aborted the process
    assert (tmp_path / "config.json").exists()
    Workdir(tmp_path, config(MLP, **(TINY | {"model.depth": 3}))).release()
    assert json.loads((tmp_path / "config.json").read_text())["model"]["depth"] == 3
    foreign = tmp_path / "foreign" / "config.json"
    foreign.parent.mkdir()
    foreign.write_text('{"mine": 1}')
    assert "another config" in refusal(argv(foreign.parent), capsys)
    assert foreign.read_text() == '{"mine": 1}'


HUGE = {"optim.name": "sgd", "optim.learning_rate": 1e30}


# Saves and logs are far away, so all steps of a dispatch have run when it is found.
FAR = dict.fromkeys(("checkpoint.every_steps", "log.every_steps", "eval.every_steps"), 100)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"checkpoint.every_steps": 1, "train.steps": 10}, ("norm became inf at step 1;",)),
        (FAR | {"train.steps": 40, "optim.clip_norm": 1e35}, ("nan at step 2;", "optim.clip_norm")),
    ],
)
def test_a_run_that_diverges_ends_and_saves_nothing_of_it(fields, words, tmp_path, capsys):
    for _ in range(2):  # the same command again ends in the same way
        assert train.main(argv(tmp_path, **HUGE, **fields)) == 3
        (line,) = capsys.readouterr().err.splitlines()
        for word in (*words, "optim.learning_rate"):
            assert word in line
        assert list((tmp_path / "checkpoints").iterdir()) == []
        assert json.loads((tmp_path / "final.json").read_text())["status"] == "diverged"
        assert read_metrics(tmp_path) == []


def test_a_mean_that_is_not_finite_is_a_divergence(tmp_path, capsys, monkeypatch):
    make = step.make_eval_step

    def make_broken(*args):
        evaluate = make(*args)
        return lambda *args: evaluate(*args) | {"loss": jnp.float32("nan")}

    monkeypatch.setattr(step, "make_eval_step", make_broken)
    words = argv(tmp_path)  # evaluates after step 4, saves after each second step
    assert train.main(words) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "eval/loss is not finite after step 4; lower optim.learning_rate" in line
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    final = json.loads((tmp_path / "final.json").read_text(), parse_constant=pytest.fail)
    assert (final["status"], final["steps"]) == ("diverged", 4)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
    assert train.main([*words, "--mode=eval"]) == 3
    assert "after step 2" in capsys.readouterr().err
