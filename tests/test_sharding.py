"""One code path for any number of devices."""

from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.training.trainer import Trainer

MLP = str(Path(__file__).parents[1] / "configs/mlp.py")
STEPS, GROUP, BATCH = 20, 5, 48
DEVICES = (1, 2, 4, 8)


def make_program(devices, **overrides):
    fields = {
        "mesh.data": devices,
        "train.epochs": None,
        "train.steps": STEPS,
        "train.batch_size": BATCH,
        "train.steps_per_dispatch": GROUP,
        "eval.batch_size": 120,
        # Adagrad's first steps are the signs of the gradients, and rounding may flip a sign.
        "optim.name": "sgd",
        "optim.learning_rate": 0.05,
    } | overrides
    return Trainer.from_config(load_config(f"{MLP}:smoke", [f"{k}={v}" for k, v in fields.items()]))


@pytest.fixture(scope="module")
def runs():
    """devices -> (program, final state, losses, evaluation, alphas)."""
    done = {}
    for devices in DEVICES:
        program = make_program(devices)
        state, batches, losses = program.init(), program.batches(0), []
        for _ in range(STEPS // GROUP):
            state, report = program.dispatch(state, list(islice(batches, GROUP)))
            losses.extend(map(float, report["loss"]))
        alphas = np.asarray(report["alphas"])
        done[devices] = program, state, losses, program.evaluate(state), alphas
    return done


@pytest.mark.parametrize("devices", DEVICES[1:])
def test_any_number_of_devices_trains_the_same(devices, runs):
    *_, one, one_evaluation, one_alphas = runs[1]
    *_, losses, evaluation, alphas = runs[devices]
    assert one[-1] < one[0]
    # Only the order of summation differs: some eps (6e-8) a step, over 20 steps of a stable run.
    np.testing.assert_allclose(losses, one, rtol=1e-5)
    np.testing.assert_allclose(alphas, one_alphas, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(evaluation["eval/loss"], one_evaluation["eval/loss"], rtol=1e-5)
    assert evaluation["eval/accuracy"] == one_evaluation["eval/accuracy"]


def test_the_state_is_born_the_same_to_the_bit_on_any_number_of_devices():
    one = make_program(1).init()
    other = make_program(8).init()
    jax.tree.map(np.testing.assert_array_equal, one["params"], other["params"])


@pytest.mark.parametrize("devices", DEVICES)
def test_every_device_holds_the_whole_state(devices, runs):
    program, state, *_ = runs[devices]
    assert program.mesh.axis_names == ("data", "model")
    assert program.mesh.size == devices
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.device_set == set(jax.devices()[:devices])
        assert leaf.sharding.is_fully_replicated
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf)
    assert jax.tree.structure(state) == jax.tree.structure(program.shapes)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(program.shapes), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


@pytest.mark.parametrize("devices", DEVICES)
def test_every_device_gets_its_part_of_each_batch(devices, runs, monkeypatch):
    program, *_ = runs[devices]
    seen = []
    compiled = program._dispatch
    monkeypatch.setattr(program, "_dispatch", lambda *args: seen.append(args) or compiled(*args))
    batches = list(islice(program.batches(0), 2))
    program.dispatch(program.init(), batches)
    ((_, _, fetched, *_),) = seen
    index = fetched["index"]
    assert index.sharding.spec == PartitionSpec(None, "data")
    assert index.shape == (GROUP, BATCH)
    np.testing.assert_array_equal(index[:2], [batch["index"] for batch in batches])
    shards = sorted(index.addressable_shards, key=lambda shard: shard.index[1].start or 0)
    assert [shard.data.shape for shard in shards] == [(GROUP, BATCH // devices)] * devices
    np.testing.assert_array_equal(np.concatenate([s.data for s in shards], axis=1), index)


@pytest.mark.parametrize("devices", [1, 4])
def test_each_device_computes_its_examples_only_and_sums_gradients(devices, runs, monkeypatch):
    program, *_ = runs[devices]
    args = []
    compiled = program._dispatch
    monkeypatch.setattr(program, "_dispatch", lambda *a: args.extend(a) or compiled(*a))
    program.dispatch(program.init(), list(islice(program.batches(0), 1)))
    text = compiled.lower(*jax.tree.map(jax.typeof, args[:1]), *args[1:]).compile().as_text()
    assert ("all-reduce" in text) == (devices > 1)
    assert f"f32[{BATCH // devices},8]" in text  # the trunk: width 8
    assert (f"f32[{BATCH},8]" in text) == (devices == 1)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_loop_moves_nothing_unasked(devices, runs):
    program, *_ = runs[devices]
    state, batches = program.init(), program.batches(0)
    with jax.transfer_guard("disallow"):
        state, _ = program.dispatch(state, list(islice(batches, GROUP)))
        state, report = program.dispatch(state, list(islice(batches, 2)))
        program.evaluate(state)
    assert int(state["step"]) == GROUP + 2
    assert np.all(np.asarray(report["loss"][:2]) > 0)


@pytest.mark.parametrize("accumulate", [2])
def test_accumulation_over_devices_gives_the_same_losses(accumulate, runs):
    _, _, expected, *_ = runs[1]
    program = make_program(4, **{"train.accumulate": accumulate})
    _, report = program.dispatch(program.init(), list(islice(program.batches(0), GROUP)))
    np.testing.assert_allclose(report["loss"], expected[:GROUP], rtol=1e-5)


@pytest.mark.parametrize(
    ("devices", "overrides", "sentence"),
    [
        (8, {"train.batch_size": 50}, "=50 does not divide among 8 devices; make it a multiple"),
        (4, {"train.accumulate": 24}, "=2 does not divide among 4 devices"),
        (8, {"eval.batch_size": 100}, "eval.batch_size=100 does not divide among 8 devices"),
        (-1, {"train.batch_size": 50}, "=50 does not divide among 8 devices"),
        (9, {}, "mesh.data=9 needs 1 to 8 devices"),
        (0, {}, "mesh.data=0 needs 1 to 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told(devices, overrides, sentence):
    with pytest.raises(UserError) as info:
        make_program(devices, **overrides)
    assert sentence in str(info.value)
    assert "\n" not in str(info.value)
