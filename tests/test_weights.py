"""Weights from PyTorch and back: round trips, names, files and errors."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from rezero_jax import MLP, Decoder, DecoderLayer, Encoder, EncoderLayer
from rezero_jax.errors import UserError
from rezero_jax.models.weights import from_torch, load_tensors, save_tensors, to_torch
from tests.families import drawn

LAYER = partial(EncoderLayer, 8, 2, 12)
MODULES = {
    "decoder_layer": partial(DecoderLayer, 8, 2, 12),
    "post_norm_decoder_layer": partial(DecoderLayer, 8, 2, 12, residual="post_norm"),
    "pre_norm_decoder_layer": partial(DecoderLayer, 8, 2, 12, residual="pre_norm"),
    "without_bias": partial(EncoderLayer, 8, 2, 12, bias=False),
    "encoder": partial(Encoder, 8, 3, 2, feedforward=12),
    "encoder_unrolled": partial(Encoder, 8, 3, 2, feedforward=12, scan=False),
    "pre_norm_encoder": partial(
        Encoder, 8, 2, 2, feedforward=12, residual="pre_norm", final_norm=True
    ),
    "decoder": partial(Decoder, 8, 2, 2, feedforward=12, final_norm=True),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def abstract(make):
    """The module without arrays, which compiles nothing."""
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


def leaves(module):
    return {path: param[...] for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value, err_msg=str(name))


# ---- Round trips


def test_round_trip_is_exact(tmp_path):
    for make in MODULES.values():
        module, other = (drawn(make, seed) for seed in (0, 50))
        tensors = to_torch(module)
        sizes = [sum(array.size for array in a.values()) for a in (tensors, leaves(module))]
        assert sizes[0] == sizes[1]
        # PyTorch warns of arrays that it may not write to.
        assert all(value.flags.c_contiguous and value.flags.writeable for value in tensors.values())
        save_tensors(tmp_path / "weights.safetensors", tensors)
        loaded = load_tensors(str(tmp_path / "weights.safetensors"))
        assert_equal(loaded, tensors)
        from_torch(other, loaded)
        assert_equal(leaves(other), leaves(module))


def test_scanned_and_unrolled_stacks_and_their_layers_share_tensors():
    scanned, unrolled = drawn(MODULES["encoder"]), drawn(MODULES["encoder_unrolled"], 50)
    tensors = to_torch(scanned)
    from_torch(unrolled, tensors)
    assert_equal(to_torch(unrolled), tensors)
    layer = abstract(LAYER)
    from_torch(layer, tensors | {"embedding.weight": normal(0, 5)}, prefix="layers.1.")
    assert_equal(leaves(layer), leaves(unrolled.layers.blocks[1]))
    again = to_torch(layer, prefix="layers.1.")
    assert_equal(again, {k: v for k, v in tensors.items() if k.startswith("layers.1.")})


def test_other_precisions_become_float32(tmp_path):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        tensors = {key: value.astype(dtype) for key, value in to_torch(drawn(LAYER)).items()}
        save_tensors(tmp_path / "weights.safetensors", tensors)
        loaded = load_tensors(tmp_path / "weights.safetensors")
        assert_equal(loaded, tensors)
        layer = abstract(LAYER)
        from_torch(layer, loaded)
        assert_equal(to_torch(layer), {k: v.astype(np.float32) for k, v in tensors.items()})


def test_files_keep_the_entries_of_arrays_in_any_order_in_memory(tmp_path):
    tensors = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array(3.0), "c": np.arange(8.0)[::2]}
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert_equal(load_tensors(tmp_path / "a.safetensors"), tensors)


# ---- Errors


def sentence(f, *args, **kwargs):
    with pytest.raises(UserError) as error:
        f(*args, **kwargs)
    return str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": normal(0, 1000)})
    whole = path.read_bytes()
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    eight_bits = len(header).to_bytes(8, "little") + header + b"\0\0"
    for content in (b"", b"no such file" * 10, whole[:-20], whole[:500], whole[:7], eight_bits):
        path.write_bytes(content)
        assert "weights.safetensors is damaged" in sentence(load_tensors, path)


def test_wrong_names_shapes_and_numbers_change_nothing():
    layer, before = drawn(LAYER), leaves(drawn(LAYER))
    tensors = to_torch(drawn(LAYER, 50))

    def without(name, **more):
        return {key: value for key, value in tensors.items() if key != name} | more

    for given, text in (
        ({}, 'lacks "resweight"; give'),
        (without("linear2.bias"), 'lacks "linear2.bias"; give'),
        (
            without("resweight", resweigth=np.zeros(1)),
            'lacks "resweight" and has "resweigth", which',
        ),
        (tensors | {"norm1.weight": np.zeros(8)}, 'has "norm1.weight", which this module lacks'),
        (tensors | {"linear1.weight": np.zeros((8, 12))}, '"linear1.weight" is (8, 12) in'),
        (tensors | {"resweight": np.zeros(())}, '"resweight" is () in the state dict and (1,) in'),
        (tensors | {"linear2.bias": np.zeros(8, int)}, '"linear2.bias" is int64'),
        (tensors | {"linear2.bias": {}}, '"linear2.bias" is object'),
    ):
        assert text in sentence(from_torch, layer, given)
        assert_equal(leaves(layer), before)
    assert 'lacks "encoder.resweight"' in sentence(from_torch, layer, tensors, prefix="encoder.")
    three = to_torch(drawn(MODULES["encoder"]))
    two, four = (abstract(partial(Encoder, 8, n, 2, feedforward=12)) for n in (2, 4))
    assert 'lacks "layers.3.resweight"' in sentence(from_torch, four, three)
    assert 'has "layers.2.resweight", which this' in sentence(from_torch, two, three)


@pytest.mark.parametrize("name", ["decoder_layer", "encoder"])
def test_modules_that_pytorch_lacks(name):
    for options, text in (
        ({"residual": "gpt2_norm"}, 'residual="rezero", "post_norm" or "pre_norm"'),
        ({"residual": "pre_norm", "norm": "dyt"}, 'norm="layer_norm"'),
        ({"alpha_per": "sublayer"}, 'alpha_per="layer"'),
        ({"rotary": True}, "rotary=False"),
        ({"kv_heads": 1}, "kv_heads=None"),
    ):
        module = abstract(partial(MODULES[name], **options))
        for f in (to_torch, partial(from_torch, tensors={})):
            assert sentence(f, module).endswith(f"make the module with {text}")
    mlp = abstract(partial(MLP, 4, 4, 1, 2))
    assert "PyTorch has no equivalent of MLP; give an EncoderLayer" in sentence(to_torch, mlp)
