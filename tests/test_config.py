"""Config files, their arguments, and fields set on the command line."""

from pathlib import Path

import pytest

from rezero_jax.config import base_config, load_config, parse_arg
from rezero_jax.errors import UserError
from rezero_jax.fields import differences, flatten
from rezero_jax.training.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
MLP = str(CONFIGS / "mlp.py")
FILES = sorted(path for path in CONFIGS.glob("*.py") if path.name != "__init__.py")


def test_arguments_take_the_type_of_their_default():
    args = parse_arg(
        "rule=norm,depth=8,lr=3,width=16,smoke",
        rule="rezero",
        depth=1,
        lr=0.1,
        width=int,
        epochs=float,
        smoke=False,
        untouched=5,
    )
    expected = {
        "rule": "norm",
        "depth": 8,
        "lr": 3.0,
        "width": 16,
        "epochs": None,
        "smoke": True,
        "untouched": 5,
    }
    assert args.to_dict() == expected
    assert isinstance(args.lr, float)
    assert parse_arg("smoke=False", smoke=True).smoke is False
    assert parse_arg("", smoke=False).smoke is False


@pytest.mark.parametrize(
    ("arg", "sentence"),
    [
        ("depht=3", 'unknown config argument "depht"; did you mean "depth"'),
        ("depth=x", "depth takes a whole number, not 'x'"),
        ("depth=2.5", "depth takes a whole number, not '2.5'"),
        ("depth", "depth takes a whole number"),
        ("depth=None", "depth takes a whole number"),
        ("lr=fast", "lr takes a number, not 'fast'"),
        ("smoke=3", "smoke takes True or False, not '3'"),
    ],
)
def test_a_wrong_argument_is_told(arg, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_arg(arg, depth=1, lr=0.1, smoke=False)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=3", 3),
        ("optim.learning_rate=1e-3", 0.001),
        ("optim.learning_rate=1", 1.0),
        ("optim.clip_norm=2", 2.0),
        ("optim.alpha.learning_rate=0.5", 0.5),
        ("optim.nesterov=true", True),
        ("optim.nesterov=False", False),
        ("data.dir=/some/Where", "/some/Where"),
        ("data.dir=None", None),
        ("train.epochs=none", None),
        ("model.residual=pre_norm", "pre_norm"),
        ("model.remat=none", "none"),
        ("optim.milestones=(0.2, 0.9)", (0.2, 0.9)),
        ("optim.milestones=0.2,0.9", (0.2, 0.9)),
        ("optim.milestones=0.2", (0.2,)),
        ("optim.alpha.name=sgd", "sgd"),
    ],
)
def test_overrides(override, value):
    found = load_config(MLP, [override])
    for key in override.partition("=")[0].split("."):
        found = found[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=3", 'unknown config key "train.stepz"; did you mean "train.steps"'),
        ("optim.alpha.lerning_rate=3", 'did you mean "optim.alpha.learning_rate"'),
        ("seed.more=3", 'unknown config key "seed.more"'),
        ("optim=3", 'unknown config key "optim"'),
        ("train.zzzzzz=3", "the keys are train.accumulate, train.batch_size, "),
        ("seed", "--config.seed has no value; write --config.seed=VALUE"),
        ("seed=1.5", "config.seed takes a whole number, not '1.5'"),
        ("seed=True", "config.seed takes a whole number, not 'True'"),
        ("seed=None", "config.seed takes a whole number, not 'None'"),
        ("seed=", "config.seed takes a whole number, not ''"),
        ("optim.learning_rate=high", "config.optim.learning_rate takes a number, not 'high'"),
        ("optim.nesterov=1", "config.optim.nesterov takes True or False, not '1'"),
    ],
)
def test_a_wrong_override_is_told(override, sentence):
    with pytest.raises(UserError) as info:
        load_config(MLP, [override])
    assert sentence in str(info.value)


@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [
        ([], (None, 20.0, None)),
        (["train.steps=10"], (10, None, None)),
        (["train.examples=10"], (None, None, 10)),
        (["train.epochs=None", "train.steps=10"], (10, None, None)),
        (["train.steps=10", "train.epochs=2"], (10, 2.0, None)),  # an error of whoever trains
        (["train.steps=None"], (None, 20.0, None)),
    ],
)
def test_a_length_on_the_command_line_displaces_that_of_the_config(overrides, lengths):
    train = load_config(MLP, overrides).train
    assert (train.steps, train.epochs, train.examples) == lengths


def test_an_interval_on_the_command_line_displaces_that_of_the_config():
    found = load_config(MLP, ["eval.every_steps=7"]).eval
    assert (found.every_steps, found.every_epochs, found.every_examples) == (7, None, None)


def test_later_overrides_win_and_the_config_is_locked():
    config = load_config(f"{MLP}:depth=7,width=9", ["model.depth=8", "model.depth=9"])
    assert (config.model.depth, config.model.width) == (9, 9)
    with pytest.raises(AttributeError):
        config.model.heads = 3
    with pytest.raises(AttributeError):
        config.optim.alpha.heads = 3


def test_differences_name_every_leaf_that_differs():
    old = {"seed": 0, "model": {"depth": 3, "width": 4}, "old": 1, "same": None}
    new = {"seed": 0, "model": {"depth": 5, "width": 4}, "new": {"x": (1,)}, "same": None}
    assert differences(old, new) == [
        "model.depth: 3 -> 5",
        "new.x: absent -> (1,)",
        "old: 1 -> absent",
    ]
    assert differences(old, old) == []


def test_two_rules_of_a_comparison_differ_in_the_rule_alone():
    """Among the fields that every experiment has and those of the family."""
    one = load_config(f"{MLP}:residual=rezero,depth=8").to_dict()
    other = load_config(f"{MLP}:residual=pre_norm,depth=8").to_dict()
    assert differences(one, other) == ["model.residual: rezero -> pre_norm"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_config_has_the_base_fields_and_a_docstring_with_its_command(file):
    base, own = (flatten(c.to_dict()) for c in (base_config(), load_config(str(file))))
    assert base.keys() <= own.keys()
    assert f"--config=configs/{file.name}" in file.read_text()


# These compile a network that another test compiles as well.
LONG = (
    *("resnet", "resnet_imagenet", "resnet_superconvergence", "vit"),
    *("transformer_enwik8", "transformer_notebook", "transformer_reduced"),
)


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[pytest.mark.slow] if f.stem in LONG else []) for f in FILES],
    ids=lambda path: path.stem,
)
def test_every_config_trains_when_small(file):
    devices = 1 if file.stem == "mlp" else 4  # the batch of the MLPs is 50
    overrides = ["train.epochs=None", "train.steps=2", f"mesh.data={devices}"]
    config = load_config(f"{file}:smoke", overrides)
    program = Trainer.from_config(config)
    state, losses = program.init(), []
    for batch in program.batches(0):
        state, report = program.dispatch(state, [batch])
        losses.append(float(report["loss"][0]))
        assert 0 < float(report["grad_norm"]) < float("inf")
    assert int(state["step"]) == len(losses) == 2
    assert 0 < losses[0] < float("inf")
    assert 0 < losses[1] < float("inf")
    assert 0 < program.evaluate(state)["eval/loss"] < float("inf")
