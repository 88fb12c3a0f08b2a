"""Runs that begin with another model's parameters, and runs that are made longer."""

import json
import shutil

import jax
import numpy as np
import pytest

from rezero_jax.data.split import Dataset, ResidentSplit
from rezero_jax.export import export
from rezero_jax.models.weights import save_tensors
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from rezero_jax.training.load import load_model, load_state
from rezero_jax.training.optim import has_same_rates
from rezero_jax.training.start import read_start
from rezero_jax.training.trainer import Trainer
from tests.families import FAMILIES, STEPS, flat, refused
from tests.faults.compare import differences

MLP = FAMILIES["mlp"]


def arrays_of(state):
    return flat({key: state[key] for key in ("params", "stats")})


def names_of(state):
    """The arrays by the names in a .safetensors file."""
    return {
        path.partition("/")[2].replace("/", "."): np.asarray(value)
        for path, value in arrays_of(state).items()
    }


def begun(config):
    """The start of a config, and the state that it makes."""
    trainer = Trainer(config)
    start = read_start(trainer)
    return start, start.apply(trainer.init())


def classes(count):
    """Random images for another number of classes."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (200, 8, 8, 1), np.uint8)
    split = ResidentSplit({"image": image, "label": np.arange(200, dtype=np.int32) % count})
    return Dataset("mine", split, split, (8, 8, 1), count, (0.5,), (0.5,))


# ---- The parameters of another model


@pytest.mark.parametrize(
    "family",
    ["mlp", "resnet", *(pytest.param(f, marks=pytest.mark.slow) for f in ("transformer", "vit"))],
)
def test_a_run_an_export_and_a_file_give_their_arrays_scanned_or_not(family, trained, tmp_path):
    source = trained(family)
    expected = names_of(load_state(source, None))
    scan = FAMILIES[family].load_config().model.scan
    options = {"model.scan": not scan, "optim.name": "sgd"}
    start, state = begun(FAMILIES[family].load_config(**{"train.init_from": source} | options))
    assert start.record["steps"] == STEPS
    assert start.record["new_head"] is None
    assert int(state["step"]) == 0
    assert names_of(state).keys() != expected.keys()
    save_tensors(tmp_path / "file.safetensors", names_of(state))
    export(str(source), str(tmp_path / "model"))
    for path in ("file.safetensors", "model"):
        fields = {"train.init_from": tmp_path / path}
        again, state = begun(FAMILIES[family].load_config(**fields))
        assert names_of(state).keys() == expected.keys()
        for name, value in names_of(state).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        assert path != "model" or again.record["content"] == start.record["content"]


def test_a_new_head_is_said_and_recorded_and_a_resumed_run_needs_no_source(
    trained, tmp_path, capsys
):
    source = shutil.copytree(trained("mlp"), tmp_path / "source")
    config = MLP.load_config(**{"train.init_from": source, "train.steps": 4})
    calls = iter([0, 15])
    with pytest.raises(loop.Interrupted):
        loop.train(config, tmp_path / "run", classes(7), stop=lambda: next(calls, 0))
    said = f"beginning with 5 arrays of {source} after 8 updates; the head is new, as "
    head = "head.bias is (10,) there and (7,) here; head.kernel is (8, 10) there and (8, 7) here"
    assert said + head in capsys.readouterr().out
    record = json.loads((tmp_path / "run/init_from.json").read_text())
    assert record["source"] == str(source)
    assert (record["steps"], record["new_head"], len(record["content"])) == (8, head, 16)
    loop.train(config, tmp_path / "straight", classes(7))
    shutil.rmtree(source)
    assert loop.train(config, tmp_path / "run", classes(7))["status"] == "finished"
    assert "beginning with" not in capsys.readouterr().out.partition("resuming")[2]
    straight, resumed = (load_state(tmp_path / name, None) for name in ("straight", "run"))
    for path, value in flat(straight).items():
        np.testing.assert_array_equal(flat(resumed)[path], value, err_msg=path)
    other = MLP.load_config(**{"train.steps": 4})
    words = f"train.init_from: {source} -> None"
    refused(lambda: loop.train(other, tmp_path / "run", classes(7)), words)
    words = f"began with the parameters of {source}"
    refused(lambda: load_model(tmp_path / "run", 0, dataset=classes(7)), words)
    refused(lambda: loop.evaluate(config, tmp_path / "run", classes(7), step=0), words)
    refused(lambda: loop.train(config, tmp_path / "new", classes(7)), "is neither a run")
    assert not (tmp_path / "new").exists()


def test_a_source_that_does_not_fit_is_a_sentence(trained, tmp_path):
    good = names_of(load_state(trained("mlp"), None))
    nan = {**good, "stem.bias": np.full(8, np.nan, np.float32)}
    integer = {**good, "stem.bias": np.zeros(8, np.int32)}
    for name, arrays in (
        ("nan", nan),
        ("integer", integer),
        ("more", good | {"more.w": np.ones(3, np.float32)}),
        ("less", {name: value for name, value in good.items() if name != "stem.bias"}),
        ("headless", {name: value for name, value in good.items() if "head" not in name}),
    ):
        save_tensors(tmp_path / f"{name}.safetensors", arrays)
    export(str(trained("mlp")), str(tmp_path / "damaged"))
    weights = tmp_path / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "empty").mkdir()
    run = trained("mlp")
    for source, fields, words in (
        (tmp_path / "none", {}, "is neither a run with checkpoints"),
        (tmp_path / "empty", {}, "is neither a run with checkpoints"),
        (tmp_path / "text.safetensors", {}, "not a safetensors file"),
        (tmp_path / "damaged", {}, "is damaged"),
        (tmp_path / "nan.safetensors", {}, "stem.bias is not finite"),
        (tmp_path / "integer.safetensors", {}, "stem.bias is int32(8,) there and (8,) here"),
        (tmp_path / "more.safetensors", {}, "more.w is (3,) there and absent here"),
        (tmp_path / "less.safetensors", {}, "stem.bias is absent there and (8,) here"),
        (run, {"model.width": 9}, "stem.kernel is (64, 8) there and (64, 9) here"),
        (run, {"model.depth": 3}, "is (4,) there and (3,) here"),
        (run, {"model.depth": 3, "model.scan": False}, "is (4,) there and (3,) here"),
        (run, {"model.residual": "pre_norm"}, "trunk.blocks.rule.alpha is (4,) there and absent"),
        (trained("transformer"), {}, "embedding is (256, 16) there and absent here"),
    ):
        config = MLP.load_config(**{"train.init_from": source} | fields)
        refused(lambda config=config: read_start(Trainer(config)), str(source), words)
    start, _ = begun(MLP.load_config(**{"train.init_from": tmp_path / "headless.safetensors"}))
    assert "head.kernel is absent there and (8, 10) here" in str(start)


# ---- A longer run


def test_a_longer_run_ends_with_the_bits_of_one_of_that_length(trained, tmp_path, capsys):
    short = MLP.load_config(**{"train.steps": 4})
    loop.train(short, tmp_path)
    for refusal, fields in (
        ("train.steps: 4 -> 3", {"train.steps": 3}),
        ("optim.learning_rate: 0.01 -> 0.5; train.steps: 4 -> 8", {"optim.learning_rate": 0.5}),
    ):
        refused(lambda f=fields: loop.train(MLP.load_config(**f), tmp_path), refusal)
    with pytest.raises(loop.Interrupted):
        loop.train(MLP.load_config(), tmp_path, stop=lambda: 15)
    assert not (tmp_path / "final.json").exists()
    assert loop.train(MLP.load_config(), tmp_path)["steps"] == STEPS
    assert differences(tmp_path, trained("mlp")) == []
    epochs = MLP.load_config(**{"train.steps": None, "train.epochs": 0.1})
    assert loop.train(epochs, tmp_path)["steps"] == 9
    assert loop.train(epochs, tmp_path)["steps"] == 9
    assert "finished run of 9 steps; nothing to do" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 10))


def test_a_schedule_that_would_change_what_was_done_is_refused(tmp_path):
    fields = {"optim.schedule": "cosine", "train.steps": 2}
    loop.train(MLP.load_config(**fields), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    longer = MLP.load_config(**fields | {"train.steps": 4})
    words = (f"{tmp_path} holds a run of 2 steps", f"--config.train.init_from={tmp_path}")
    refused(lambda: loop.train(longer, tmp_path), *words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("fields", "steps", "same"),
    [
        ({}, 100, True),
        ({"schedule": "linear"}, 0, True),
        ({"schedule": "linear"}, 100, False),
        ({"schedule": "cosine", "warmup_steps": 30}, 30, True),
        ({"schedule": "cosine", "warmup_steps": 30}, 40, False),
        ({"schedule": "multistep"}, 50, True),
        ({"schedule": "multistep"}, 51, False),
        ({"schedule": "piecewise", "points": ((0.0, 0.5), (1.0, 0.5))}, 100, True),
        ({"schedule": "piecewise"}, 100, False),
        ({"name": "sgd", "momentum_points": ((0.0, 0.9), (1.0, 0.5))}, 100, False),
        ({"alpha.schedule": "linear"}, 100, False),
    ],
)
def test_whether_two_lengths_have_the_same_rates(fields, steps, same):
    config = MLP.load_config(**{f"optim.{key}": value for key, value in fields.items()})
    assert has_same_rates(config.optim, 100, 200, steps) is same
    assert jax.tree.leaves(config.optim.to_dict())  # the config is only read
