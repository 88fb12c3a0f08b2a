"""Which form attention takes on which device, and that the forms agree."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rezero_jax import devices
from rezero_jax.models.transformer.attention import attend
from rezero_jax.models.transformer.layer import DecoderLayer

H100, V100, MI300 = "NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X"
GPU_KINDS = {  # whether cuDNN's attention runs there
    H100: True,
    "NVIDIA A100-SXM4-40GB": True,
    "NVIDIA GeForce RTX 3090": True,
    "NVIDIA RTX A6000": True,
    "NVIDIA L4": True,
    "NVIDIA TITAN RTX": False,
    "NVIDIA GeForce RTX 2080 Ti": False,
    "NVIDIA GeForce GTX 1080": False,
    "NVIDIA T4G": False,
    "Tesla T4": False,
    V100: False,
    "Quadro RTX 8000": False,
    MI300: False,
}


@pytest.mark.parametrize(
    ("target", "dtype", "size", "length", "taken"),
    [
        (("gpu", H100), jnp.float16, 64, 4, True),
        (("gpu", H100), jnp.bfloat16, 8, 4, True),
        (("gpu", H100), jnp.bfloat16, 128, 4, True),
        (("gpu", H100), jnp.bfloat16, 136, 4, False),
        (("gpu", H100), jnp.bfloat16, 12, 4, False),
        (("gpu", H100), jnp.bfloat16, 64, 5, False),
        (("gpu", H100), jnp.float32, 64, 4, False),
        (("cpu", "cpu"), jnp.bfloat16, 64, 4, False),
        (("tpu", "TPU v5 lite"), jnp.bfloat16, 64, 4, False),
        *((("gpu", kind), jnp.bfloat16, 64, 4, taken) for kind, taken in GPU_KINDS.items()),
    ],
)
def test_cudnn_is_chosen_where_it_can(target, dtype, size, length, taken, monkeypatch):
    calls = recorded_calls(target, monkeypatch)
    q, k = jnp.zeros((1, length, 4, size), dtype), jnp.zeros((1, length, 2, size), dtype)
    jax.eval_shape(lambda: attend(q, k, k, is_causal=True))
    expected = {"mask": None, "is_causal": True, "implementation": "cudnn" if taken else None}
    assert calls == ([] if target[0] == "cpu" else [expected])


def test_cudnn_gets_masks_of_every_head_query_and_key(monkeypatch):
    """It takes no axes of size 1, as masks of padding have them."""
    calls = recorded_calls(("gpu", H100), monkeypatch)
    layer = DecoderLayer(16, 2, kv_heads=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, memory = jnp.zeros((3, 4, 16)), jnp.zeros((3, 6, 16))
    masks = {"key_mask": jnp.ones((3, 4), bool), "memory_key_mask": jnp.ones((3, 6), bool)}
    jax.eval_shape(lambda: layer(x, memory, is_causal=True, **masks))
    jax.eval_shape(lambda: layer(x, memory, jnp.ones((4, 4), bool)))
    assert [call["implementation"] for call in calls] == ["cudnn"] * 4
    shapes = [call["mask"] if call["mask"] is None else call["mask"].shape for call in calls]
    assert shapes == [(3, 2, 4, 4), (3, 2, 4, 6), (3, 2, 4, 4), None]
    assert [call["is_causal"] for call in calls] == [True, False, False, False]


def recorded_calls(target, monkeypatch):
    """The keywords with which jax.nn.dot_product_attention is called for a target."""
    calls = []

    def record(q, k, v, **options):
        calls.append(options)
        return q

    monkeypatch.setattr(devices, "target", lambda: devices.Target(*target))
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return calls
