"""Operations of an update are counted as by hand, and train.py --plan prints them."""

import socket
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import train
from rehearsal.plan import WIDTH
from rezero_jax.training import cost
from rezero_jax.training.trainer import Trainer
from tests.families import config


def scanned(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()


def convolved_in_three_groups(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=3
    )


def test_counts():
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    product = 2 * 4 * 5 * 6  # FLOPs of x @ w
    x, w = shape((4, 5)), shape((5, 6))
    for function, args, expected in (
        (lambda x, w: jnp.tanh(x @ w), (x, w), product),
        (
            jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b)),
            (shape((3, 4, 5)), shape((3, 5, 6))),
            3 * product,
        ),
        (
            jax.grad(scanned, argnums=(0, 1)),
            (shape((7, 5, 5)), shape((4, 5))),
            3 * 7 * 2 * 4 * 5 * 5,
        ),
        # Both products, the first rematerialised for the gradient of tanh, two gradients of w and
        # one of the hidden layer; the second product need not be rematerialised.
        (
            jax.grad(jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w.T).sum())),
            (w, x),
            7 * product,
        ),
        (
            convolved_in_three_groups,
            (shape((2, 8, 8, 3)), shape((3, 3, 1, 6))),
            2 * (2 * 8 * 8 * 6) * (3 * 3),
        ),
        (
            lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w.T @ w, lambda: x @ w),
            (w, x),
            3 * product,
        ),
    ):
        assert cost.flops(function, *args) == expected
    total = cost.flops(lambda x, w: jnp.tanh(x @ w).T.sum(), x, w, everything=True)
    assert total == product + 2 * 4 * 6


def test_a_plan_needs_no_data(tmp_path, monkeypatch, capsys):
    def connect(*args):
        raise AssertionError("a plan opened a socket")

    monkeypatch.setattr(socket.socket, "connect", connect)
    file = "--config=configs/mlp.py:smoke,dataset=cifar10"
    flags = ["--config.mesh.data=2", f"--config.data.dir={tmp_path / 'data'}"]
    assert train.main([file, *flags, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    here = {line[:WIDTH].rstrip(): line[WIDTH:] for line in lines}
    count = 3072 * 8 + 8 + 4 * (8 * 8 + 8) + 4 + 8 * 10 + 10
    assert here["parameters"] == f"{count:,}"
    assert here["devices"].startswith("2 x cpu (data 2 x model 1")
    assert list(tmp_path.iterdir()) == []


SIZES = {"depth": 3, "width": 16, "length": 128, "batch": 8, "vocabulary": 256}


def transformer(**fields):
    overrides = {
        "model.depth": SIZES["depth"],
        "model.scan": True,
        "model.max_len": SIZES["length"],
        "data.length": SIZES["length"],
        "train.batch_size": SIZES["batch"],
        "mesh.data": 1,
    } | fields
    settings = config("transformer_small.py:smoke", **overrides)
    return Trainer(settings)


@pytest.mark.parametrize(("remat", "scan", "accumulate"), [("full", True, 2), ("dots", False, 1)])
def test_model_flops_are_counted_by_hand_and_exclude_remat(remat, scan, accumulate, monkeypatch):
    # The loss computes its logits in chunks and rematerialises them in the backward pass.
    monkeypatch.setattr("rezero_jax.models.transformer.model.LOGITS_AT_ONCE", 2**16)
    trainer = transformer(
        **{"model.remat": remat, "model.scan": scan, "train.accumulate": accumulate}
    )
    layers, width, length, batch, vocabulary = SIZES.values()
    # For each token forward: queries, keys, values and output; two products of attention with every
    # position; two layers of 4 * width; then the head. Backward twice that.
    layer = 2 * 4 * width**2 + 2 * 2 * length * width + 2 * 2 * 4 * width**2
    expected = 3 * batch * length * (layers * layer + 2 * width * vocabulary)
    assert cost.model_flops(trainer) == expected
    assert cost.update_flops(trainer) != expected  # logits twice, half of the causal attention


def test_neither_dropout_nor_a_kernel_changes_model_flops(monkeypatch):
    expected = cost.model_flops(transformer())
    assert cost.model_flops(transformer(**{"model.dropout": 0.1})) == expected
    half = transformer(**{"model.dtype": "bfloat16"})
    for platform, kind in (("gpu", "NVIDIA H100 80GB HBM3"), ("tpu", "TPU v5 lite")):
        device = SimpleNamespace(platform=platform, device_kind=kind)
        with monkeypatch.context() as patched:
            patched.setattr("rezero_jax.devices.jax.devices", lambda *_, device=device: [device])
            assert cost.model_flops(half) == expected
