"""One code path for any devices: the same training, however batch and state are sharded."""

import dataclasses
import random
import re
from collections import Counter
from functools import partial
from itertools import islice, product

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from ml_collections import ConfigDict

from rehearsal.plan import compile_dispatch
from rezero_jax import MLP, Transformer
from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.models.dropout import random_bits
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.training import sharding, trainer
from rezero_jax.training.state import init_state, model_spec
from rezero_jax.training.trainer import Trainer, microbatches
from tests.families import SGD, config, train
from tests.test_processes import alone, assert_same_curve, end, start

STEPS = 20
COMMON = {
    "train.epochs": None,
    "train.steps": STEPS,
    "train.steps_per_dispatch": STEPS,
    "eval.every_epochs": None,
    "eval.every_steps": None,
    "eval.batch_size": 120,
} | SGD
FAMILIES = {
    "mlp": (
        "mlp.py:smoke",
        {"model.width": 32, "train.batch_size": 48, "optim.alpha.name": None},
    ),
    "resnet": (
        "resnet.py:smoke",
        {"train.batch_size": 16, "optim.learning_rate": 0.02, "data.crop_padding": 0},
    ),
    "transformer": (
        "transformer_small.py:smoke",
        {
            "model.alpha_init": 1.0,
            "model.scan": True,
            "optim.learning_rate": 0.5,
            "eval.examples": 64,
        },
    ),
}
MESHES = {  # data, model, fully_sharded
    "one": (1, 1, False),
    "data 4": (4, 1, False),
    "full 4": (4, 1, True),
    "full 4 x model 2": (4, 2, True),
    "data 8": (8, 1, False),
    "model 2": (1, 2, False),
    "data 4 x model 2": (4, 2, False),
}
FAST = {
    *product(["mlp", "resnet", "transformer"], ["data 4"]),
    ("resnet", "full 4"),  # convolutions are not sharded over channels
    *product(["mlp", "transformer"], ["full 4 x model 2"]),
}
CASES = [
    pytest.param(family, mesh, marks=[] if (family, mesh) in FAST else [pytest.mark.slow])
    for family, mesh in product(FAMILIES, MESHES)
    if mesh != "one" and not (family == "resnet" and "model" in mesh)
]


def make_trainer(family, mesh, **fields):
    file, own = FAMILIES[family]
    places = dict(zip(("mesh.data", "mesh.model", "mesh.fully_sharded"), MESHES[mesh], strict=True))
    return Trainer(config(file, **(COMMON | own | places | fields)))


@pytest.fixture(scope="module")
def runs():
    """(family, mesh) -> trainer, state, losses, evaluation and initial parameters of a run."""
    done = {}

    def get(family, mesh):
        if (family, mesh) not in done:
            trainer = make_trainer(family, mesh)
            state = trainer.init()
            born = jax.tree.map(np.array, state["params"])
            losses, state = train(trainer, state=state)
            done[family, mesh] = trainer, state, losses, trainer.evaluate(state), born
        return done[family, mesh]

    return get


@pytest.mark.guarantee("sharding")
@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_every_mesh_trains_the_same(family, mesh, runs):
    _, one_state, one_losses, one_evaluation, one_born = runs(family, "one")
    _, state, losses, evaluation, born = runs(family, mesh)
    assert one_losses[-5:].mean() < one_losses[:5].mean() - 0.1
    # Only the order of summation differs: some eps (6e-8) a step, over 20 steps of a stable run.
    np.testing.assert_allclose(losses, one_losses, rtol=2e-5)
    np.testing.assert_allclose(evaluation["eval/loss"], one_evaluation["eval/loss"], rtol=2e-5)
    for trees, rtol, atol in (
        # The same bits, perhaps scaled in another way.
        ((one_born, born), 0, 2 * np.finfo(np.float32).eps),
        ((one_state["params"], state["params"]), 1e-3, 1e-4),
    ):
        for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(b, a, rtol=rtol, atol=atol * np.abs(a).max())


@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_each_device_holds_its_share(family, mesh, runs):
    trainer, state, *_ = runs(family, mesh)
    data, model, fully_sharded = MESHES[mesh]
    sizes = {"opt_state": 0, "params": 0}
    for (path, leaf), shape in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(trainer.shapes), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
        assert leaf.sharding.device_set == set(jax.devices()[: data * model])
        axes = Counter(leaf.sharding.spec)
        shard = leaf.addressable_shards[0].data
        ways = data ** axes["data"] * model ** axes["model"]
        assert shard.size * ways == leaf.size
        assert axes["data"] == 0 or (fully_sharded and leaf.size >= sharding.FULLY_SHARDED_FROM)
        if path_text(path[:1]) in sizes:
            sizes[path_text(path[:1])] += shard.size
    whole = trainer.spec.parameter_count
    # Gates, and small or odd arrays, stay whole.
    share = 0.75 if model > 1 else 0.5 if fully_sharded else 1
    assert sizes["params"] <= share * whole
    assert sizes["opt_state"] == pytest.approx(sizes["params"], abs=whole * 0.01)  # momentum


def test_each_device_gets_its_shard_of_each_batch_and_all_meet_in_the_updates_alone(
    runs, monkeypatch
):
    trainer, *_ = runs("mlp", "data 4")
    seen, compiled = [], trainer.jitted_dispatch
    monkeypatch.setattr(
        trainer, "jitted_dispatch", lambda *args: seen.append(args) or compiled(*args)
    )
    batches = list(islice(trainer.batches(0), 2))
    trainer.dispatch(trainer.init(), batches)
    index = seen[0][2]["index"]
    assert index.sharding.spec == PartitionSpec(None, "data")
    np.testing.assert_array_equal(index[:2], [batch["index"] for batch in batches])
    assert [shard.data.shape for shard in index.addressable_shards] == [(STEPS, 12)] * 4
    monkeypatch.undo()
    text = compile_dispatch(trainer).as_text()
    assert "f32[12,32]" in text  # the trunk's activations
    assert "f32[48,32]" not in text
    # Two collectives that do not wait for each other can lock the devices of a CPU.
    entry = text[text.index("\nENTRY ") :]
    assert "channel_id" in entry
    assert entry.index(" while(") < entry.index("channel_id")


def test_the_loop_moves_nothing_unasked(runs):
    trainer, *_ = runs("mlp", "data 4")
    state, batches = trainer.init(), trainer.batches(0)
    with jax.transfer_guard("disallow"):
        state, _ = trainer.dispatch(state, list(islice(batches, 5)))
        state, report = trainer.dispatch(state, list(islice(batches, 2)))
        trainer.evaluate(state)
    assert int(state["step"]) == 7
    assert np.all(np.asarray(report["loss"][:2]) > 0)


def test_a_checkpoint_of_any_mesh_goes_on_on_any_other(runs, tmp_path):
    saver, state, *_ = runs("transformer", "full 4 x model 2")
    trainer = make_trainer("transformer", "data 4")
    checkpoints = Checkpoints(tmp_path / "checkpoints", saver.config.checkpoint)
    checkpoints.save(STEPS, state, {}, None)
    checkpoints.finish()
    restored, _ = checkpoints.restore(trainer.shapes, warn=pytest.fail)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    for leaf, shape in zip(jax.tree.leaves(restored), jax.tree.leaves(trainer.shapes), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


# ---- Microbatches and evaluations


def test_several_devices_need_fewer_microbatches():
    for accumulate, batch_size, devices, count in (
        (1, 144, 8, 1),
        (4, 144, 1, 4),
        (4, 144, 8, 1),
        (9, 1080, 2, 5),
        (9, 1080, 8, 3),
    ):
        assert microbatches(accumulate, batch_size, devices) == count


@pytest.mark.parametrize(
    ("memory", "count", "remat"), [(None, 4, "full"), (1e12, 1, "none"), (1.0, 4, "full")]
)
def test_a_gpu_has_the_fewest_microbatches_that_fit_and_no_remat(memory, count, remat, monkeypatch):
    monkeypatch.setattr(trainer, "gpu_memory", lambda kind: memory)
    fields = {"train.accumulate": 4, "train.batch_size": 16, "mesh.data": 1, "model.remat": "full"}
    found = Trainer(config("transformer_small.py:smoke", **fields))
    assert found.microbatches == count
    model = found.spec.model(found.shapes["params"], found.shapes["stats"])
    assert model.trunk.layers.remat == remat


def test_accumulation_over_devices_gives_the_same_losses(runs):
    _, _, expected, *_ = runs("mlp", "one")
    # The 8 microbatches of one device are 2 on each of four.
    losses, _ = train(make_trainer("mlp", "data 4", **{"train.accumulate": 8}), 5)
    np.testing.assert_allclose(losses, expected[:5], rtol=1e-5)


def test_batch_norm_keeps_its_microbatches():
    """The examples that share statistics are part of the model."""
    fields = {"model.depth": 8, "model.width": 4, "train.accumulate": 4, "train.batch_size": 24}
    fields |= {"mesh.data": -1, "train.epochs": 1.0}
    trainer = Trainer(config("resnet.py:smoke", **fields))
    assert trainer.mesh.shape["data"] == 6  # of microbatches of 6 examples


def test_an_evaluation_has_at_most_two_batches_pending(monkeypatch):
    """With dozens, two devices of a CPU with two cores waited for each other for ever."""
    trainer, events = make_trainer("mlp", "one"), []

    def evaluate_batch(*_):
        events.append("start")
        return {"weight": np.ones(())}

    monkeypatch.setattr(trainer, "_eval_step", evaluate_batch)
    monkeypatch.setattr(jax, "block_until_ready", lambda sums: events.extend(["wait"] * len(sums)))
    trainer.evaluate(trainer.init())
    assert len(events) > 4
    assert events == ["start", *["start", "wait"] * (len(events) // 2)]


# ---- The axis along which each parameter is sharded


def specs(make, *, data=1, model=1, fully_sharded=False):
    """Path -> the sharding of a parameter; its momentum must be sharded the same way."""
    spec = model_spec(lambda rngs: make(rngs=rngs))
    init = partial(init_state, lambda rngs: make(rngs=rngs), optax.trace(0.9))
    shapes = jax.eval_shape(init, jax.random.key(0))
    mesh = sharding.place_devices(jax.devices(), data, model)
    placed = sharding.state_shardings(shapes, mesh, spec, fully_sharded)
    params, momenta = (
        {path_text(path): tuple(x.spec) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (placed["params"], placed["opt_state"].trace)
    )
    assert params == momenta
    return params


def test_full_sharding_is_along_the_longest_axis_that_divides_and_never_along_layers():
    found = specs(partial(MLP, 64, 96, 2, 48), data=4, fully_sharded=True)
    assert found["stem/kernel"] == (None, "data")  # 64 x 96
    assert found["head/kernel"] == ("data", None)  # 96 x 48
    odd = specs(partial(MLP, 64, 90, 2, 48), data=4, fully_sharded=True)
    assert odd["stem/kernel"] == ("data", None)  # 64 x 90
    for model, along_model in ((1, None), (2, "model")):
        deep = specs(partial(MLP, 16, 16, 64, 4), data=4, model=model, fully_sharded=True)
        assert deep["trunk/blocks/linear/kernel"] == (None, "data", along_model)
        assert deep["trunk/blocks/linear/bias"] == (None, along_model or "data")
        assert deep["trunk/blocks/rule/alpha"] == (None,)


OUTPUTS, INPUTS, WHOLE = -1, -2, None  # the axis of one layer's parameter that is sharded
ATTENTION = {"qkv": -3, "qkv_bias": -3, "out/kernel": INPUTS, "out/bias": WHOLE}
LAYER = {
    **{f"attention/{name}": axis for name, axis in ATTENTION.items()},
    "feedforward/up/kernel": OUTPUTS,
    "feedforward/up/bias": OUTPUTS,
    "feedforward/down/kernel": INPUTS,
    "feedforward/down/bias": WHOLE,
    "rules/0/alpha": WHOLE,
}
SHARDED = {  # constructor, trunk, sharded axes of one block's and of the other parameters
    "mlp": (
        partial(MLP, 12, 8, 3, 4),
        "trunk",
        {"linear/kernel": OUTPUTS, "linear/bias": OUTPUTS, "rule/alpha": WHOLE},
        {"stem/kernel": OUTPUTS, "stem/bias": OUTPUTS, "head/kernel": WHOLE, "head/bias": WHOLE},
    ),
    "transformer": (
        partial(Transformer, 16, 8, 3, 4, 6, positions="learned"),
        "trunk/layers",
        LAYER,
        {"embedding": -2, "position": WHOLE, "head": -1, "head_bias": -1},
    ),
}


@pytest.mark.parametrize("family", SHARDED)
def test_every_parameter_is_sharded_along_the_axis_that_the_table_names(family):
    make, trunk, block, others = SHARDED[family]
    for scan in (True, False):
        blocks = [f"{trunk}/blocks/"] if scan else [f"{trunk}/blocks/{i}/" for i in range(3)]
        expected = others | {start + name: axis for start in blocks for name, axis in block.items()}
        found = specs(partial(make, scan=scan), data=2, model=4)
        assert found.keys() == expected.keys()
        for path, axis in expected.items():
            axes = ["model" if i == axis else None for i in range(-len(found[path]), 0)]
            assert list(found[path]) == axes, path


# ---- Communication in the compiled updates


def collectives(trainer):
    """How often each kind of communication is in the compiled dispatch."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    text = compile_dispatch(trainer).as_text()
    return Counter(re.findall(rf"= [^\n]*? ({kinds})(?:-start)?\(", text))


def test_only_full_sharding_fetches_weights(runs):
    for mesh, fields in (
        ("data 4", {"train.accumulate": 2}),  # an accumulation leaves each example on its device
        ("model 2", {}),
    ):
        assert collectives(make_trainer("transformer", mesh, **fields)).keys() == {"all-reduce"}
    assert collectives(runs("transformer", "full 4 x model 2")[0])["all-gather"]


# ---- Meshes


def test_a_mesh_that_does_not_fit_is_an_error():
    for family, fields, words in (
        ("resnet", {"mesh.model": 2}, r"mesh\.model=2 finds nothing to shard"),
        ("mlp", {"mesh.model": 0}, r"mesh\.model=0"),
        ("mlp", {"mesh.model": 4, "mesh.data": 3}, r"mesh\.data=3 .* 1 to 2 devices"),
        ("mlp", {"mesh.data": 0}, r"mesh\.data=0"),
        ("mlp", {"mesh.data": 8, "train.batch_size": 50}, r"mesh\.data=8 .* train\.batch_size=50"),
        ("transformer", {"mesh.model": 8}, r"mesh\.model=8 does not divide the 4 of axis -3 of"),
    ):
        fields = {"mesh.data": -1, "mesh.model": 1, "mesh.fully_sharded": False} | fields
        with pytest.raises(UserError, match=words):
            make_trainer(family, "one", **fields)


def mesh_for(devices, size, data=-1, model=1):
    fields = ConfigDict({"data": data, "model": model})
    return sharding.make_mesh(fields, devices, "train.batch_size", size)


def test_the_mesh_has_the_most_devices_among_which_the_batch_divides(capsys):
    devices = jax.devices()
    assert mesh_for(devices, 16).shape == {"data": 8, "model": 1}
    assert capsys.readouterr().err == ""
    assert mesh_for(devices, 12, model=2).shape == {"data": 4, "model": 2}
    assert mesh_for(devices, 12).shape == {"data": 6, "model": 1}
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.search(r"train\.batch_size=12 .* leaves 2 of the 8 devices idle", warning)
    assert mesh_for(devices, 12, data=3).size == 3
    assert capsys.readouterr().err == ""  # the user asked for it


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def slices(count, side=4, **fields):
    """`count` slices of side x side chips, four of them, 2 x 2, in each process."""
    devices = []
    for index, x, y in product(range(count), range(side), range(side)):
        host = (index * side + y // 2 * 2) * side // 4 + x // 2
        number = (index * side + y) * side + x
        devices.append(Device(number, host, index, (x, y, 0), **fields))
    random.Random(0).shuffle(devices)
    return devices


def test_several_processes_leave_no_device_idle(monkeypatch, unchecked):
    assert mesh_for(slices(1), 12).size == 12  # a plan for absent devices
    monkeypatch.setattr("jax.process_count", lambda: 2)
    for size, data in ((12, -1), (64, 8)):
        with pytest.raises(UserError, match=r"of the 16 devices idle.*several processes"):
            mesh_for(slices(1), size, data)


def test_a_cpu_keeps_its_order():
    devices = jax.devices()
    mesh = sharding.place_devices(devices[::-1], 2, 3)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.tolist() == [devices[:3], devices[3:6]]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_slices_have_an_axis_of_their_own(unchecked, platform):
    kind = {"tpu": "TPU v5 lite", "gpu": "NVIDIA H100 80GB HBM3"}[platform]
    devices = slices(2, platform=platform, device_kind=kind)
    for data, model in ((32, 1), (16, 2), (8, 4)):
        mesh = sharding.place_devices(devices, data, model)
        assert mesh.axis_names == ("replica", "data", "model")
        assert mesh.devices.shape == (2, data // 2, model)
        for index, one in enumerate(mesh.devices):
            assert {device.slice_index for device in one.flat} == {index}
        assert len(set(mesh.devices.flat)) == 32
    for data, model in ((1, 32), (3, 6), (10, 2)):
        with pytest.raises(UserError, match=f"mesh.data={data} and .* among 2 slices"):
            sharding.place_devices(devices, data, model)


def test_each_slice_drops_out_its_own():
    devices = np.reshape(jax.devices()[:4], (2, 2, 1))
    mesh = Mesh(devices, ("replica", "data", "model"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        draw = jax.jit(lambda key: random_bits(key, (8, 64)))
        bits = draw(jax.random.key(0, impl="rbg"))
    assert bits.sharding.spec == PartitionSpec(("replica", "data"))
    assert len(np.unique(bits, axis=0)) == 8


INTERLEAVED = """\
import runpy, sys
import numpy as np
from jax.sharding import AxisType, Mesh
from rezero_jax.training import sharding

def place_devices(devices, data, model):
    mixed = sorted(devices, key=lambda device: (device.id % 2, device.process_index))
    assert [device.process_index for device in mixed] == [0, 1, 0, 1]
    axes = ("replica", "data", "model")
    return Mesh(np.reshape(mixed, (2, 2, 1)), axes, axis_types=(AxisType.Auto,) * 3)

sharding.place_devices = place_devices
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_processes_whose_rows_are_not_adjacent_train_as_one(tmp_path):
    fields = {"train.steps": 20, "log.every_steps": 1, "mesh.fully_sharded": True}
    fields |= {"optim.name": "sgd", "optim.learning_rate": 0.02}
    alone(tmp_path / "one", 4, **fields)
    processes = start(2, tmp_path / "two", ("-c", INTERLEAVED), **fields | {"mesh.cpu_devices": 2})
    for status, _, err in end(processes):
        assert status == 0, err
    assert_same_curve(tmp_path / "one", tmp_path / "two")
