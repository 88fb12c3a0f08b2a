"""One code path for any number of devices."""

import importlib.util
import math
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rehearsal.plan import trainer_for_sizes
from rehearsal.topologies import devices_of
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.training import trainer
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
        (9, {}, "mesh.data=9 is out of range; there are 8 device(s)"),
        (0, {}, "mesh.data=0 is out of range; there are 8 device(s)"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told(devices, overrides, sentence):
    with pytest.raises(UserError) as info:
        make_program(devices, **overrides)
    assert sentence in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.slow
def test_devices_among_which_a_batch_does_not_divide_repeat_work(runs, capsys):
    """48 examples on 32 of 40 devices' worth: here 12 on 4 of 8."""
    program = make_program(-1, **{"train.batch_size": 12})
    assert program.mesh.shape == {"spare": 2, "data": 4, "model": 1}
    assert "train.batch_size=12 divides among 4 of the 8 devices" in capsys.readouterr().err
    losses = []
    for one in (program, make_program(4, **{"train.batch_size": 12})):
        _, report = one.dispatch(one.init(), list(islice(one.batches(0), 3)))
        losses.append(np.asarray(report["loss"][:3]))
        assert one.evaluate(one.init())["eval/loss"] > 0
    np.testing.assert_array_equal(*losses)


@pytest.mark.slow
def test_an_evaluation_takes_any_batch_on_any_number_of_devices(runs):
    expected = None
    for devices, size in ((1, 100), (8, 100), (8, 1), (4, 50)):
        program = make_program(devices, **{"eval.batch_size": size})
        found = program.evaluate(program.init())["eval/loss"]
        expected = expected or found
        np.testing.assert_allclose(found, expected, rtol=1e-6)


class Pending:
    """A sum that the device still computes."""

    under_way = 0

    def __init__(self):
        self.is_waited_for = False
        Pending.under_way += 1

    def block_until_ready(self):
        Pending.under_way -= not self.is_waited_for
        self.is_waited_for = True

    def __float__(self):
        self.block_until_ready()
        return 1.0


def test_an_evaluation_has_no_more_than_two_batches_under_way(runs, monkeypatch):
    """With dozens, two devices of a CPU with two cores waited for each other for ever."""
    program, state, *_ = runs[2]
    most = []

    def evaluate_batch(*_):
        part = {"weight": Pending()}
        most.append(Pending.under_way)
        return part

    monkeypatch.setattr(program, "_eval_step", evaluate_batch)
    program.evaluate(state)
    assert len(most) > 2
    assert max(most) == 2
    assert Pending.under_way == 0


@pytest.mark.parametrize(
    ("accumulate", "batch_size", "devices", "parts"),
    [
        (1, 144, 8, 1),
        (4, 144, 1, 4),
        (4, 144, 8, 1),
        (9, 1080, 2, 5),
        (9, 1080, 8, 3),
        (9, 48, 8, 2),
    ],
)
def test_several_devices_need_fewer_parts(accumulate, batch_size, devices, parts):
    assert trainer.fewest_parts(accumulate, batch_size, devices) == parts
    assert batch_size % (devices * parts) == 0
    assert batch_size / (devices * parts) <= batch_size / accumulate


def test_networks_with_batch_norm_keep_their_parts():
    """The examples that share statistics are part of the model."""
    overrides = {"model.depth": 8, "model.width": 4, "data.name": "digits", "train.accumulate": 4}
    config = load_config("configs/resnet.py:smoke", [f"{k}={v}" for k, v in overrides.items()])
    with config.unlocked():
        config.train.batch_size = 24
    assert dict(Trainer.from_config(config).mesh.shape)["data"] == 2  # of parts of 6 examples


PUBLISHED = [
    "mlp.py:residual=rezero,depth=64,dataset=cifar10",
    "mlp.py:depth=10000,width=150,lr=0.003,dataset=cifar10",
    "resnet.py:depth=56,residual=rezero,recipe=paper",
    "resnet.py:family=preact,depth=18,residual=rezero",
    "resnet_imagenet.py",
    "transformer_enwik8.py:layers=12,residual=rezero",
    "transformer_enwik8.py:layers=64",
    "transformer_enwik8.py:layers=128",
    "transformer_small.py",
]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='pip install "jax[tpu]" for absent devices'
)
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:16x16"])
@pytest.mark.parametrize("config", PUBLISHED)
def test_the_published_commands_find_their_mesh(config, topology):
    found = trainer_for_sizes(load_config(f"configs/{config}"), devices_of(topology))
    mesh = found.mesh
    assert mesh.size == math.prod(int(side) for side in topology.split(":")[1].split("x"))
    batch = found.config.train.batch_size
    assert mesh.shape["data"] == math.gcd(batch, mesh.size)
