"""Full sharding and tensor parallelism: the same training, the state spread over the devices."""

import re
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from rezero_jax import MLP, Decoder, Transformer
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.training import sharding
from rezero_jax.training.arrange import arrange
from rezero_jax.training.state import init_state, model_spec, path_text
from rezero_jax.training.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 20
# Adam's first steps are the signs of the gradients, and rounding may flip a sign: hence SGD.
COMMON = {
    "train.epochs": None,
    "train.steps": STEPS,
    "train.steps_per_dispatch": STEPS,
    "optim.name": "sgd",
    "optim.schedule": "constant",
    "optim.learning_rate": 0.05,
    "eval.every_epochs": None,
    "eval.every_steps": None,
    "eval.batch_size": 120,
}
FAMILIES = {
    "mlp": (
        "mlp.py:smoke",
        {
            "model.width": 32,
            "train.batch_size": 48,
            "eval.batch_size": 120,
            "optim.alpha.name": None,
        },
    ),
    "resnet": (
        "resnet.py:smoke",
        {"train.batch_size": 16, "optim.learning_rate": 0.02, "data.crop_padding": 0},
    ),
    "transformer": (
        "transformer_small.py:smoke",
        {"model.alpha_init": 1.0, "optim.learning_rate": 0.5, "eval.examples": 64},
    ),
}
MESHES = {  # data, model, fully_sharded
    "one": (1, 1, False),
    "data": (4, 1, False),
    "full": (4, 1, True),
    "model": (1, 2, False),
    "data+model": (2, 2, False),
    "full+model": (2, 2, True),
    "data of 2": (2, 1, False),
    "data of 8": (8, 1, False),
    "full of 8": (8, 1, True),
    "data of 4+model": (4, 2, False),
    "full of 4+model": (4, 2, True),
}
SLOW = {("mlp", "data+model"), ("transformer", "data+model"), ("resnet", "full")}
PLACES = [
    pytest.param(
        family, mesh, marks=[pytest.mark.slow] if (family, mesh) in SLOW or "of" in mesh else []
    )
    for family in FAMILIES
    for mesh in MESHES
    if mesh != "one" and not (family == "resnet" and "model" in mesh)
]


def make_program(family, mesh, **overrides):
    file, fields = FAMILIES[family]
    data, model, fully_sharded = MESHES[mesh]
    fields = COMMON | fields | overrides
    fields |= {"mesh.data": data, "mesh.model": model, "mesh.fully_sharded": fully_sharded}
    return Trainer.from_config(
        load_config(str(CONFIGS / file), [f"{key}={value}" for key, value in fields.items()])
    )


@pytest.fixture(scope="module")
def runs():
    """(family, mesh) -> (program, final state, losses, evaluation), made when asked for."""
    done = {}

    def get(family, mesh):
        if (family, mesh) not in done:
            program = make_program(family, mesh)
            state, report = program.dispatch(program.init(), list(islice(program.batches(0), 20)))
            losses, evaluation = np.asarray(report["loss"]), program.evaluate(state)
            done[family, mesh] = program, state, losses, evaluation
        return done[family, mesh]

    return get


@pytest.mark.parametrize(("family", "mesh"), PLACES)
def test_every_mesh_trains_the_same(family, mesh, runs):
    _, one_state, one_losses, one_evaluation = runs(family, "one")
    _, state, losses, evaluation = runs(family, mesh)
    assert one_losses[-5:].mean() < one_losses[:5].mean() - 0.1
    # Only the order of summation differs: some eps (6e-8) a step, over 20 steps of a stable run.
    np.testing.assert_allclose(losses, one_losses, rtol=2e-5)
    np.testing.assert_allclose(evaluation["eval/loss"], one_evaluation["eval/loss"], rtol=2e-5)
    for one, other in zip(
        jax.tree.leaves(one_state["params"]), jax.tree.leaves(state["params"]), strict=True
    ):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize(("family", "mesh"), PLACES)
def test_the_state_is_born_the_same(family, mesh, runs):
    one, other = (runs(family, name)[0].init()["params"] for name in ("one", mesh))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        # The same random bits; the compiler may round their scaling in another way.
        np.testing.assert_allclose(
            b, a, rtol=0, atol=2 * np.finfo(np.float32).eps * np.abs(a).max()
        )


@pytest.mark.parametrize(("family", "mesh"), PLACES)
def test_each_device_holds_its_share(family, mesh, runs):
    program, state, *_ = runs(family, mesh)
    data, model, fully_sharded = MESHES[mesh]
    sizes = {"opt_state": 0, "params": 0}
    for (path, leaf), shape in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(program.shapes), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
        cut = Counter(leaf.sharding.spec)
        shard = leaf.addressable_shards[0].data
        ways = data ** cut["data"] * model ** cut["model"]
        assert shard.size * ways == leaf.size
        assert cut["data"] == 0 or (fully_sharded and leaf.size >= sharding.FULLY_SHARDED_FROM)
        if path_text(path) == "step":
            assert ways == 1
        if path_text(path[:1]) in sizes:
            sizes[path_text(path[:1])] += shard.size
    whole = program.spec.parameter_count
    # What stays whole: gates, and small or odd arrays.
    share = 0.75 if model > 1 else 0.5 if fully_sharded else 1
    assert sizes["params"] <= share * whole
    assert sizes["opt_state"] == pytest.approx(sizes["params"], abs=whole * 0.01)  # momentum


def test_a_layer_axis_is_never_cut(runs):
    _, state, *_ = runs("mlp", "full+model")
    specs = {path_text(p): x.sharding.spec for p, x in jax.tree.leaves_with_path(state["params"])}
    assert specs["trunk/blocks/linear/kernel"] == PartitionSpec(None, "data", "model")
    assert specs["trunk/blocks/rule/alpha"] == PartitionSpec(None)
    assert specs["head/bias"] == PartitionSpec(None)


def specs(make, *, data=1, model=1, fully_sharded=False):
    """Path -> how a parameter of the model lies on a mesh; its momentum must lie the same way."""
    spec = model_spec(lambda rngs: make(rngs=rngs))
    init = partial(init_state, lambda rngs: make(rngs=rngs), optax.trace(0.9))
    shapes = jax.eval_shape(init, jax.random.key(0))
    placed = sharding.state_shardings(
        shapes, arrange(jax.devices(), data, model), spec, fully_sharded
    )
    params, momenta = (
        {path_text(path): tuple(x.spec) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (placed["params"], placed["opt_state"].trace)
    )
    assert params == momenta
    return params


def test_full_sharding_cuts_the_longest_axis_that_divides():
    found = specs(partial(MLP, 64, 96, 2, 48), data=4, fully_sharded=True)
    assert found["stem/kernel"] == (None, "data")  # 64 x 96
    assert found["head/kernel"] == ("data", None)  # 96 x 48
    odd = specs(partial(MLP, 64, 90, 2, 48), data=4, fully_sharded=True)
    assert odd["stem/kernel"] == ("data", None)  # 64 x 90


OUTPUTS, INPUTS, WHOLE = -1, -2, None  # the axis of one layer's parameter that is cut
ATTENTION = {"qkv": -3, "qkv_bias": -3, "out/kernel": INPUTS, "out/bias": WHOLE}
LAYER = {
    **{f"attention/{name}": axis for name, axis in ATTENTION.items()},
    "feedforward/up/kernel": OUTPUTS,
    "feedforward/up/bias": OUTPUTS,
    "feedforward/down/kernel": INPUTS,
    "feedforward/down/bias": WHOLE,
    "rules/0/alpha": WHOLE,
}
CUTS = {  # constructor; what one block's and what the other parameters are cut along
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
    "decoder": (
        partial(Decoder, 8, 4, 3),
        "layers",
        LAYER | {f"cross_attention/{name}": axis for name, axis in ATTENTION.items()},
        {},
    ),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("family", CUTS)
def test_every_parameter_is_cut_along_the_axis_that_the_table_says(family, scan):
    make, trunk, block, others = CUTS[family]
    blocks = [f"{trunk}/blocks/"] if scan else [f"{trunk}/blocks/{i}/" for i in range(3)]
    expected = others | {start + name: axis for start in blocks for name, axis in block.items()}
    found = specs(partial(make, scan=scan), data=2, model=4)
    assert found.keys() == expected.keys()
    for path, axis in expected.items():
        cut = ["model" if i == axis else None for i in range(-len(found[path]), 0)]
        assert list(found[path]) == cut, path


@pytest.mark.parametrize("model", [1, 2])
def test_a_layer_axis_is_not_cut_even_where_it_is_the_longest(model):
    found = specs(partial(MLP, 16, 16, 64, 4), data=4, model=model, fully_sharded=True)
    along_model = None if model == 1 else "model"
    assert found["trunk/blocks/linear/kernel"] == (None, "data", along_model)
    assert found["trunk/blocks/linear/bias"] == (None, along_model or "data")
    assert found["trunk/blocks/rule/alpha"] == (None,)


def test_a_declared_axis_that_does_not_divide_is_an_error():
    with pytest.raises(UserError, match=r"mesh.model=4 does not divide the 6 of axis -1 of stem/"):
        specs(partial(MLP, 8, 6, 2, 4), model=4)


def collectives(program):
    """How often each kind of communication stands in the compiled training step."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return Counter(re.findall(rf"= [^\n]*? ({kinds})(?:-start)?\(", program.compile().as_text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_data_parallelism_sums_gradients_and_fetches_nothing(family, runs):
    program, *_ = runs(family, "data")
    assert collectives(program).keys() == {"all-reduce"}


@pytest.mark.parametrize("family", ["mlp", "transformer"])
def test_accumulation_leaves_each_example_on_its_device(family):
    program = make_program(family, "data", **{"train.accumulate": 2})
    assert collectives(program).keys() == {"all-reduce"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_collective_beside_the_updates(family, runs):
    """Two that wait for nothing of each other can lock the devices of a CPU."""
    program, *_ = runs(family, "data")
    text = program.compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert "channel_id" in entry
    assert entry.index(" while(") < entry.index("channel_id")


@pytest.mark.parametrize("family", ["mlp", "transformer"])
def test_tensor_parallelism_fetches_no_weights(family, runs):
    program, *_ = runs(family, "model")
    found = collectives(program)
    assert found["all-reduce"]
    if family == "transformer":
        assert found.keys() == {"all-reduce"}


def test_full_sharding_fetches_weights_layer_by_layer(runs):
    program, *_ = runs("transformer", "full")
    assert collectives(program)["all-gather"]


@pytest.mark.parametrize(
    ("first", "then"), [("full", "one"), ("one", "full+model"), ("full+model", "data")]
)
def test_a_checkpoint_of_any_mesh_goes_on_on_any_other(first, then, runs, tmp_path):
    saver, state, *_ = runs("transformer", first)
    program, _, _, evaluation = runs("transformer", then)
    checkpoints = Checkpoints(tmp_path / "checkpoints", saver.config.checkpoint)
    checkpoints.save(STEPS, state, {}, None)
    checkpoints.wait()
    restored, _ = checkpoints.restore(program.shapes, warn=pytest.fail)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    for leaf, shape in zip(jax.tree.leaves(restored), jax.tree.leaves(program.shapes), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    found = program.evaluate(restored)
    np.testing.assert_allclose(found["eval/loss"], evaluation["eval/loss"], rtol=2e-5)


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("resnet", {"mesh.model": 2}, "finds nothing to cut in this network; set it to 1"),
        ("mlp", {"mesh.model": 3}, "mesh.model=3 does not divide the 8 device(s)"),
        ("mlp", {"mesh.model": 0}, "mesh.model=0 is out of range; give 1 to"),
        (
            "mlp",
            {"mesh.model": 4, "mesh.data": 3},
            "mesh.data=3 is out of range; there are 2 device(s)",
        ),
        ("transformer", {"mesh.model": 8}, "mesh.model=8 does not divide the 4 of axis -3 of"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told(family, fields, sentence):
    file, own = FAMILIES[family]
    fields = COMMON | own | {"mesh.data": -1} | fields
    overrides = [f"{key}={value}" for key, value in fields.items()]
    with pytest.raises(UserError) as info:
        Trainer.from_config(load_config(str(CONFIGS / file), overrides))
    assert sentence in str(info.value)
    assert "\n" not in str(info.value)
