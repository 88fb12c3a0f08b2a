"""Every mistake is one sentence, found before anything is written."""

import json
import shutil
from pathlib import Path

import pytest

import train
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.residual import RULES
from rezero_jax.runs.folder import Workdir
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop

MLP = str(Path(__file__).parents[1] / "configs/mlp.py")
EIGHT = pytest.mark.devices(8)
SMOKE = {"mesh.data": 1, "train.epochs": None, "train.steps": 4}

GROUPS = """
from configs import mlp
from rezero_jax.config import optim_group

def get_config(arg=""):
    config = mlp.get_config("smoke")
    for number, path in enumerate(arg.split("+")):
        config.optim.groups[f"group{number}"] = optim_group(path=path)
    return config
"""


def command(workdir, spec=f"{MLP}:smoke", **fields):
    settings = [f"--config.{key}={value}" for key, value in (SMOKE | fields).items()]
    return [f"--config={spec}", f"--workdir={workdir}", *settings]


def refusal(argv, capsys):
    """The sentence with which `argv` is refused."""
    assert train.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("train.py: ")
    return line


def listing(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert train.main(command(folder)) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """The workdir of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


RULE_NAMES = ", ".join(sorted(RULES))


@pytest.mark.guarantee("bad input")
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"train.stepz": 3}, 'unknown config key "train.stepz"; did you mean "train.steps"?'),
        ({"modle.depth": 3}, 'did you mean "model.depth"?'),
        ({"train.steps": "many"}, "config.train.steps takes a whole number, not 'many'"),
        ({"optim.learning_rate": "high"}, "config.optim.learning_rate takes a number"),
        ({"optim.learning_rate": -1.0}, "cannot be negative"),
        ({"optim.warmup_steps": -1}, "cannot be negative"),
        ({"optim.clip_norm": 0.0}, "optim.clip_norm=0.0 is not positive"),
        ({"seed": None}, "config.seed takes a whole number, not 'None'"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"model.residual": "rezerro"}, f'did you mean "rezero"? The valid ones are {RULE_NAMES}'),
        ({"optim.name": "adam"}, "The valid ones are adagrad, adamw, lamb, muon, sgd"),
        ({"optim.alpha.name": "x"}, "choose one of adagrad, adamw, lamb, muon, sgd"),
        ({"optim.schedule": "step"}, "The valid ones are constant, cosine, linear, multistep"),
        ({"data.name": "cifar"}, 'did you mean "cifar10"? The valid ones are cifar10, cifar100'),
        ({"model.remat": "some"}, "choose one of dots, full, none"),
        ({"model.dtype": "float64"}, "The valid ones are auto, bfloat16, float32"),
        ({"model.name": "x"}, 'unknown model "x"'),
        ({"model.depth": 0}, "depth is 0; a network needs a depth of at least 1"),
        ({"model.width": 1000000}, "there are "),
        ({"model.width": 0}, "width is 0; a network needs a width of at least 1"),
        ({"train.batch_size": 1438}, "larger than the 1437 training examples"),
        ({"train.batch_size": 0}, "train.batch_size=0 is empty"),
        ({"eval.batch_size": 0}, "evaluation batch size 0 is empty"),
        ({"train.accumulate": 3}, "train.accumulate=3 does not divide train.batch_size=50"),
        ({"train.accumulate": 0}, "train.accumulate=0 does not divide train.batch_size=50"),
        ({"train.steps": None}, "set train.steps, train.epochs or train.examples"),
        ({"train.epochs": 2.0}, "train.steps and train.epochs are both set"),
        ({"train.steps": -3}, "train.steps=-3 is not positive"),
        (
            {"eval.every_steps": 2, "eval.every_epochs": 1.0},
            "eval.every_steps and eval.every_epochs are both set",
        ),
        ({"eval.every_epochs": -1.0}, "eval.every_epochs=-1.0 is not positive"),
        ({"train.steps_per_dispatch": 0}, "train.steps_per_dispatch=0 is not positive"),
        ({"log.every_steps": 0}, "log.every_steps=0 is not positive"),
        ({"checkpoint.every_steps": 0}, "checkpoint.every_steps=0 is not positive"),
        ({"checkpoint.keep": 0}, "checkpoint.keep=0 is not positive"),
        ({"checkpoint.keep_every_steps": 0}, "checkpoint.keep_every_steps=0 is not positive"),
        ({"seed": 99999999999999999999}, "seed=99999999999999999999 is too large; give at most"),
        ({"seed": 2**32}, "seed=4294967296 is too large; give at most 4294967295"),
        ({"model.width": 999999999}, "model.width=999999999 is too large; give at most 1000000"),
        ({"train.steps": 2**31}, "train.steps=2147483648 is too large; give at most 2147483647"),
        ({"optim.learning_rate": "1e999"}, "optim.learning_rate=inf is not finite"),
        ({"optim.b1": 1.5}, "optim.b1=1.5 is too large; give 0 to below 1"),
        ({"optim.b2": 1.0}, "optim.b2=1.0 is out of range; give 0 to below 1"),
        ({"optim.momentum": -0.1}, "optim.momentum=-0.1 is negative; give 0 to below 1"),
        ({"optim.weight_decay": -1.0}, "optim.weight_decay=-1.0 is negative; give at least 0"),
        ({"optim.alpha.weight_decay": -1.0}, "optim.alpha.weight_decay=-1.0 is negative"),
        ({"data.jitter": 2.0}, "data.jitter=2.0 is too large; give at most 1"),
        ({"mesh.cpu_devices": 100000}, "mesh.cpu_devices=100000 is too large; give at most 1024"),
        ({"mesh.cpu_devices": 0}, "mesh.cpu_devices=0 is out of range; give 1 to 1024"),
        pytest.param(
            {"mesh.data": 9}, "mesh.data=9 is out of range; there are 8 device(s)", marks=EIGHT
        ),
        pytest.param({"mesh.data": 4}, "does not divide among 4 devices", marks=EIGHT),
        pytest.param(
            {"mesh.model": 3}, "mesh.model=3 does not divide the 8 device(s)", marks=EIGHT
        ),
    ],
)
def test_a_field_that_cannot_be(fields, sentence, tmp_path, capsys):
    assert sentence in refusal(command(tmp_path / "run", **fields), capsys)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("configs/nowhere.py", "there is no config file configs/nowhere.py; the project's own"),
        (MLP.replace("mlp", "mpl"), f"did you mean {MLP}?"),
        (f"{MLP}:smoke,depht=3", 'unknown config argument "depht"; did you mean "depth"?'),
        (f"{MLP}:smoke,depth=deep", "depth takes a whole number, not 'deep'"),
        (f"{MLP}:smoke,depth", "depth takes a whole number"),
        (__file__.replace(".py", ""), "there is no config file"),
    ],
)
def test_a_config_that_cannot_be(spec, sentence, tmp_path, capsys):
    assert sentence in refusal(command(tmp_path / "run", spec), capsys)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_config(arg):\n    return {}\n", "returned a dict; it must return a ConfigDict"),
        ("\nimport (\n", "{path}, line 2, failed (SyntaxError: "),
        ("x = 1\ny = x / 0\n", "{path}, line 2, failed (ZeroDivisionError: division by zero)"),
        ("def get_config(arg):\n    return int('x')\n", "{path}, line 2, failed (ValueError: "),
        ("import sys\nsys.exit(0)\n", "{path}, line 2, failed (SystemExit: 0)"),
    ],
)
def test_a_config_file_that_fails(text, sentence, tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(text)
    argv = command(tmp_path / "run", str(path))
    assert sentence.format(path=path) in refusal(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_place_of_a_config_file(tmp_path, capsys):
    folder = str(Path(MLP).parent)
    sentence = refusal(command(tmp_path / "run", folder), capsys)
    assert f"{folder} is a folder; name one of the config files in it" in sentence


@pytest.mark.parametrize("flags", [[], ["--plan"]])
def test_an_empty_workdir(flags, tmp_path, capsys, monkeypatch):
    """As an unset variable of the shell makes it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        train.main([*command(""), *flags])
    assert "--workdir= is empty" in capsys.readouterr().err
    assert listing(tmp_path) == {}


def test_a_config_file_that_is_not_python(tmp_path, capsys):
    path = tmp_path / "config.txt"
    path.write_text("x = 1\n")
    assert "is not a Python file" in refusal(command(tmp_path / "run", str(path)), capsys)


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        ("nothing", "optim.groups.group0.path='nothing' matches no parameter of this model"),
        ("bias+head", "head/bias belongs to the optimizer groups group0 and group1"),
    ],
)
def test_optimizer_groups_that_do_not_fit(paths, sentence, tmp_path, capsys):
    path = tmp_path / "groups.py"
    path.write_text(GROUPS)
    assert sentence in refusal(command(tmp_path / "run", f"{path}:{paths}"), capsys)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    argv = command(tmp_path / "file" / "run")
    assert "cannot write to the workdir" in refusal(argv, capsys)
    assert listing(tmp_path) == {Path("file"): b"mine"}


def test_a_workdir_of_another_config(run, capsys):
    before = listing(run)
    sentence = refusal(command(run, **{"model.depth": 3, "seed": 5}), capsys)
    assert "another config (model.depth: 4 -> 3; seed: 0 -> 5)" in sentence
    assert listing(run) == before


@pytest.mark.parametrize("name", ["config.json", "final.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff"])
def test_a_broken_file_of_the_run_is_told(name, text, run, capsys):
    (run / name).write_text(text, errors="surrogateescape")
    before = listing(run)
    sentence = refusal(command(run), capsys)
    assert f"{run / name} is broken (" in sentence
    assert listing(run) == before


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["config.json"], "the run has finished, but config.json is missing"),
        (["checkpoints"], "the run has finished, but its checkpoints are missing"),
        (["config.json", "checkpoints"], "but config.json is and its checkpoints are missing"),
    ],
)
def test_a_finished_run_that_lacks_something_does_not_count(names, sentence, run, capsys):
    for name in names:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = listing(run)
    assert sentence in refusal(command(run), capsys)
    assert listing(run) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_before_its_first_update_leaves_nothing(there, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("cannot compile")

    workdir = tmp_path / "runs" / "first"
    if there:
        workdir.mkdir(parents=True)
        (workdir / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    config = load_config(f"{MLP}:smoke", [f"{k}={v}" for k, v in SMOKE.items()])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "dispatch", fail)
        with pytest.raises(RuntimeError, match="cannot compile"):
            loop.train(config, workdir)
    assert listing(tmp_path) == before


def test_a_run_killed_before_its_first_update_gives_way_to_another_config(tmp_path, capsys):
    config = load_config(f"{MLP}:smoke", [f"{k}={v}" for k, v in SMOKE.items()])
    Workdir(tmp_path, config)  # what a process that XLA aborts leaves
    assert (tmp_path / "config.json").exists()
    assert train.main(command(tmp_path, **{"model.depth": 3})) == 0
    assert json.loads((tmp_path / "config.json").read_text())["model"]["depth"] == 3
    assert "another config" in refusal(command(tmp_path), capsys_cleared(capsys))


def capsys_cleared(capsys):
    capsys.readouterr()
    return capsys


def test_a_config_json_of_something_else_is_left(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    assert "another config" in refusal(command(tmp_path), capsys)
    assert (tmp_path / "config.json").read_text() == '{"mine": 1}'


def test_evaluation_without_a_run(tmp_path, capsys):
    argv = [*command(tmp_path / "run"), "--mode=eval"]
    assert "holds no checkpoint yet; wait for the first, or train there" in refusal(argv, capsys)
    assert listing(tmp_path) == {}


def test_reading_the_metrics_of_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_metrics(tmp_path)


HUGE = {"optim.name": "sgd", "optim.learning_rate": 1e30, "checkpoint.every_steps": 1}


@pytest.mark.parametrize(
    ("group", "steps"),
    [
        pytest.param(1, 10, marks=pytest.mark.slow),
        (3, 10),
        pytest.param(1, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_diverges_ends_and_saves_nothing_of_it(group, steps, tmp_path, capsys):
    """Also where the last update is the one that does it."""
    fields = {"train.steps_per_dispatch": group, "log.every_steps": 1, "train.steps": steps}
    argv = command(tmp_path, **HUGE, **fields)
    for _ in range(2):  # the same command again: the same end
        assert train.main(argv) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("train.py: ")
        assert "the parameter norm became inf at step 1; lower optim.learning_rate" in line
        assert list((tmp_path / "checkpoints").iterdir()) == []
        assert json.loads((tmp_path / "final.json").read_text())["status"] == "diverged"
        assert read_metrics(tmp_path) == []


def test_clipping_is_not_advised_where_it_is_set(tmp_path, capsys):
    assert train.main(command(tmp_path, **HUGE, **{"optim.clip_norm": 1.0})) == 3
    assert "; lower optim.learning_rate or optim.clip_norm, and start" in capsys.readouterr().err


def test_divergence_within_a_dispatch_names_the_step_where_it_began(tmp_path, capsys):
    """Saves and logs are far away, so all steps of a dispatch have run when it is found."""
    fields = HUGE | {"checkpoint.every_steps": 100, "log.every_steps": 100}
    argv = command(tmp_path, **fields, **{"train.steps_per_dispatch": 4, "train.steps": 40})
    assert train.main(argv) == 3
    assert "became nan at step 2;" in capsys.readouterr().err
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert json.loads((tmp_path / "final.json").read_text())["status"] == "diverged"
