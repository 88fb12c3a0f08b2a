"""Baselines are what they claim to be, and a table has a row for every program."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rehearsal import table
from rehearsal.baseline import make_model
from rehearsal.baseline_step import Baseline
from rehearsal.plan import trainer_for_sizes
from rezero_jax.config import load_config

IMAGE, CLASSES = (32, 32, 3), 10
TRANSFORMER, SMALL = "configs/transformer_enwik8.py", "configs/transformer_small.py"
FAMILIES = {
    "mlp": ("configs/mlp.py:smoke,dataset=cifar10", "configs/mlp.py:depth=64,dataset=cifar10"),
    "resnet": ("configs/resnet.py:depth=8", "configs/resnet.py:depth=56"),
    "transformer": (f"{TRANSFORMER}:smoke", f"{TRANSFORMER}:depth=128"),
}


def baseline(config):
    return make_model(config.model, IMAGE, CLASSES, 0)


def made(config):
    """The baseline, made in one compiled function."""
    return nnx.jit(lambda: baseline(config))()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baseline_has_the_number_of_parameters_of_ours(family):
    for spec in FAMILIES[family]:
        config = load_config(spec)
        if config.data.name == "stdlib":
            config.data.name = "enwik8"
        params = nnx.state(nnx.eval_shape(lambda config=config: baseline(config)), nnx.Param)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert count == trainer_for_sizes(config).spec.parameter_count


def test_the_trunk_of_a_baseline_is_the_identity_at_init():
    for name in ("mlp", "transformer"):
        config = load_config(FAMILIES[name][0])
        model = made(config)
        x = jax.random.normal(jax.random.key(0), (2, 8, config.model.width))
        assert jnp.array_equal(model.trunk(x), x)
        model.trunk.blocks.alpha[...] += 1.0
        assert not jnp.allclose(model.trunk(x), x)
    config = load_config("configs/resnet.py:depth=8")
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, config.model.width))
    assert jnp.array_equal(made(config).blocks[0](x), x)


@pytest.mark.slow
def test_a_fully_sharded_baseline_compiles_with_remat_in_bfloat16():
    fields = ["mesh.fully_sharded=True", "model.remat=full", "model.dtype=bfloat16"]
    config = load_config("configs/transformer_enwik8.py:smoke", fields)
    compiled = Baseline(config, jax.devices()[:2], None).compile()
    whole = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(baseline(config), nnx.Param)))
    )
    # Parameters and two moments, most of them halved.
    assert compiled.memory_analysis().argument_size_in_bytes < 0.7 * 3 * whole


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs JAX's CUDA plugin: make rehearse-gpu",
)
@pytest.mark.parametrize(
    ("spec", "launches", "kilobytes"),
    [
        (f"{SMALL}:steps=500,depth=2 model.dropout=0.1 model.remat=full", 163, 275_000),
        ("configs/mlp.py:smoke", 48, 290),
    ],
)
def test_an_update_on_a_gpu_has_no_more_launches_and_bytes(spec, launches, kilobytes):
    found = table.account_alone(spec, "1xh200", "ours")
    assert found["launches"] <= launches
    assert found["bytes_moved"] <= 1000 * kilobytes


def test_a_program_that_fails_is_a_row_and_the_exit_status(capsys):
    flags = ["--configs", "configs/mlp.py:smoke", "--topologies", "v9:2x2", "--only-ours"]
    assert table.main(flags) == 1
    output = capsys.readouterr()
    assert '| mlp.py:smoke | v9:2x2 | unknown topology "v9:2x2"' in output.out
    assert "configs/mlp.py:smoke does not compile for v9:2x2" in output.err


def test_a_row_compares_ours_with_the_baseline():
    one = {"estimate": 0.09, "kernels_at_least": 0.01, "estimate_of_a_dispatch": 0.0}
    one |= {"bound_by_flops": 0.05, "bytes": {"used": 2e9}}
    one |= {"compile_seconds": 3.0, "collectives": []}
    for size, devices in ((3_000_000, 4), (1_500_000, 2), (400, 4)):
        gradients = {"kind": "all-reduce", "bytes": size, "count": 2, "devices": devices}
        one["collectives"].append(gradients | {"groups": "{}"})
    row = {"config": "configs/mlp.py", "topology": "v5e:2x2", "ours": one}
    row["baseline"] = {"estimate": 0.15, "bytes": {"used": 4e9}, "compile_seconds": 5.0}
    found = dict(zip(table.HEAD, table.table_row(row), strict=True))
    assert found["ours: update, ms"] == "90"
    assert found["baseline / ours"] == "1.50"
    assert found["share"] == "50.0%"
    assert found["memory, GB"] == "2 / 4"
    sums = "all-reduce 6 MB among 4, all-reduce 3 MB among 2"
    assert found["collectives of an update"] == sums
    assert len(table.table_row(row | {"baseline": None})) == len(table.HEAD)
    # Without the GPU, the kernels of its convolutions are unknown.
    row["ours"] = one | {"convolutions": 56}
    found = dict(zip(table.HEAD, table.table_row(row), strict=True))
    assert found["ours: update, ms"] == "90, 56 convolutions as copies"
    assert (found["baseline / ours"], found["share"]) == ("-", "-")
