"""Config files, their arguments, and fields set on the command line."""

import pytest

from rezero_jax.config import base_config, differences, flatten, load_config, parse_arg
from rezero_jax.errors import UserError
from rezero_jax.training.trainer import Trainer
from tests.families import ROOT, config

FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


def test_arguments_take_the_type_of_their_default():
    defaults = {"rule": "rezero", "lr": 0.1, "width": int, "epochs": float, "smoke": False, "n": 5}
    args = parse_arg("rule=norm,lr=3,width=16,smoke", **defaults)
    changed = {"rule": "norm", "lr": 3.0, "width": 16, "epochs": None, "smoke": True}
    assert args.to_dict() == defaults | changed
    assert isinstance(args.lr, float)
    assert parse_arg("smoke=False", smoke=True).smoke is False
    for arg, words in (
        ("depht=3", '"depht"; did you mean "depth"'),
        ("depth=2.5", "depth .*whole number"),
        ("depth", "depth .*whole number"),
        ("depth=None", "depth .*whole number"),
        ("lr=fast", "lr .*number"),
        ("smoke=3", "smoke .*True or False"),
    ):
        with pytest.raises(UserError, match=words):
            parse_arg(arg, depth=1, lr=0.1, smoke=False)


def test_overrides():
    for key, text, value in (
        ("seed", "3", 3),
        ("optim.learning_rate", "1e-3", 0.001),
        ("optim.clip_norm", "2", 2.0),
        ("optim.nesterov", "true", True),
        ("optim.nesterov", "False", False),
        ("data.dir", "/some/Where", "/some/Where"),
        ("data.dir", "None", None),
        ("train.epochs", "none", None),
        ("model.residual", "pre_norm", "pre_norm"),
        ("model.remat", "none", "none"),
        ("optim.milestones", "(0.2, 0.9)", (0.2, 0.9)),
        ("optim.milestones", "0.2,0.9", (0.2, 0.9)),
        ("optim.milestones", "0.2", (0.2,)),
        ("optim.milestones", "[0.2, 0.9]", (0.2, 0.9)),
        ("optim.points", "[[0, 1], [1, 0]]", ((0, 1), (1, 0))),
        ("optim.alpha.name", "sgd", "sgd"),
    ):
        found = flatten(config("mlp.py", **{key: text}).to_dict())[key]
        assert found == value
        assert type(found) is type(value)


def test_a_wrong_override_is_named():
    for override, words in (
        ("train.stepz=3", 'config key "train.stepz"; did you mean "train.steps"'),
        ("modle.depth=3", 'did you mean "model.depth"'),
        ("optim.alpha.lerning_rate=3", 'did you mean "optim.alpha.learning_rate"'),
        ("seed.more=3", '"seed.more"'),
        ("optim=3", '"optim"'),
        ("train.zzzzzz=3", "train.accumulate, train.batch_size, "),
        ("seed", "--config.seed"),
        ("seed=1.5", "config.seed .*whole number.*1.5"),
        ("seed=True", "config.seed .*whole number"),
        ("seed=None", "config.seed .*whole number"),
        ("seed=", "config.seed .*whole number"),
        ("optim.learning_rate=high", "config.optim.learning_rate .*number"),
        ("optim.learning_rate=1e999", "optim.learning_rate=inf"),
        ("optim.milestones=(0.5, 1e999)", "optim.milestones=inf"),
        ("optim.milestones=('a',)", "optim.milestones=.*a"),
        ("optim.milestones=[[0.5]]", "optim.milestones=.*0.5"),
        ("optim.milestones=(0.5, True)", "numbers such as"),
        ("optim.learning_rate=1" + "0" * 400, "number, not '1000"),
        ("model.width=[64]", "config.model.width .*whole number.*64"),
        ("train.steps=2147483648", "train.steps=2147483648"),
        ("optim.nesterov=1", "config.optim.nesterov .*True or False"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(f"{ROOT}/configs/mlp.py", [override])


def test_a_length_on_the_command_line_replaces_the_length_of_the_file():
    for fields, lengths in (
        ({}, (None, 20.0, None)),
        ({"train.steps": 10}, (10, None, None)),
        ({"train.examples": 10}, (None, None, 10)),
        ({"train.epochs": None, "train.steps": 10}, (10, None, None)),
        ({"train.steps": 10, "train.epochs": 2}, (10, 2.0, None)),  # which Intervals refuses
        ({"train.steps": None}, (None, 20.0, None)),
    ):
        train = config("mlp.py", **fields).train
        assert (train.steps, train.epochs, train.examples) == lengths
        found = config("mlp.py", **fields, **{"eval.every_steps": 7}).eval
        assert (found.every_steps, found.every_epochs, found.every_examples) == (7, None, None)


def test_later_overrides_win_and_the_config_is_locked():
    found = config("mlp.py:depth=7,width=9", **{"model.depth": 8})
    assert (found.model.depth, found.model.width) == (8, 9)
    with pytest.raises(AttributeError):
        found.optim.alpha.heads = 3


def test_differences_name_every_leaf_that_differs():
    old = {"seed": 0, "model": {"depth": 3, "width": 4}, "old": 1, "same": None}
    new = {"seed": 0, "model": {"depth": 5, "width": 4}, "new": {"x": (1,)}, "same": None}
    assert differences(old, new) == [
        "model.depth: 3 -> 5",
        "new.x: absent -> (1,)",
        "old: 1 -> absent",
    ]
    assert differences(old, old) == []
    # Two rules of a comparison differ in the rule alone.
    rezero, pre_norm = (
        config(f"mlp.py:residual={rule},depth=8").to_dict() for rule in ("rezero", "pre_norm")
    )
    assert differences(rezero, pre_norm) == ["model.residual: rezero -> pre_norm"]


def test_every_config_has_the_base_fields_and_a_docstring_with_its_command():
    base = flatten(base_config().to_dict()).keys()
    for file in FILES:
        assert base <= flatten(config(file.name).to_dict()).keys()
        assert f"--config=configs/{file.name}" in file.read_text()


@pytest.mark.slow  # other tests train one config of each family
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_config_trains_when_small(file):
    devices = 1 if file.stem == "mlp" else 4  # the batch of the MLPs is 50
    fields = {"train.epochs": None, "train.steps": 2, "mesh.data": devices}
    trainer = Trainer(config(f"{file.name}:smoke", **fields))
    state, losses = trainer.init(), []
    for batch in trainer.batches(0):
        state, report = trainer.dispatch(state, [batch])
        losses.append(float(report["loss"][0]))
        assert 0 < float(report["grad_norm"]) < float("inf")
    assert int(state["step"]) == len(losses) == 2
    assert all(0 < loss < float("inf") for loss in losses)
    assert 0 < trainer.evaluate(state)["eval/loss"] < float("inf")
