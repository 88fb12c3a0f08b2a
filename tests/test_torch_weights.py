"""Weights from PyTorch and back: round trips, files, errors, and PyTorch itself."""

import functools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from rezero_jax import MLP
from rezero_jax.errors import UserError
from rezero_jax.models.torch_weights import from_torch, load_tensors, save_tensors, to_torch
from rezero_jax.models.transformer.encoder import Decoder, Encoder
from rezero_jax.models.transformer.layer import DecoderLayer, EncoderLayer

LAYER = partial(EncoderLayer, 8, 2, 12)
MODULES = {
    "encoder_layer": LAYER,
    "decoder_layer": partial(DecoderLayer, 8, 2, 12),
    "post_norm_decoder_layer": partial(DecoderLayer, 8, 2, 12, residual="post_norm"),
    "pre_norm_decoder_layer": partial(DecoderLayer, 8, 2, 12, residual="pre_norm"),
    "without_bias": partial(EncoderLayer, 8, 2, 12, bias=False),
    "encoder": partial(Encoder, 8, 2, 3, feedforward=12),
    "encoder_unrolled": partial(Encoder, 8, 2, 3, feedforward=12, scan=False),
    "pre_norm_encoder": partial(
        Encoder, 8, 2, 2, feedforward=12, residual="pre_norm", final_norm=True
    ),
    "decoder": partial(Decoder, 8, 2, 2, feedforward=12, final_norm=True),
}
INPUTS = {"x": (2, 5, 8), "memory": (2, 3, 8)}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def new(make, seed=0):
    """A module with parameters of NumPy's making, which compiles nothing."""
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    for i, (_, param) in enumerate(nnx.to_flat_state(nnx.state(module, nnx.Param))):
        param.set_value(jnp.asarray(normal(seed + i, *param.shape)))
    return module


def leaves(module):
    return {path: param[...] for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def assert_same(module, other):
    ours, theirs = leaves(module), leaves(other)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert theirs[path].dtype == value.dtype == jnp.float32
        np.testing.assert_array_equal(theirs[path], value, err_msg=str(path))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_round_trip_is_exact(name, kind, tmp_path):
    module, other = (new(MODULES[name], seed) for seed in (0, 50))
    tensors = to_torch(module)
    assert sum(tensor.size for tensor in tensors.values()) == sum(
        value.size for value in leaves(module).values()
    )
    save_tensors(tmp_path / f"weights.{kind}", tensors)
    loaded = load_tensors(str(tmp_path / f"weights.{kind}"))
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype == np.float32
        assert value.flags.c_contiguous
        assert value.flags.writeable  # or PyTorch warns
        np.testing.assert_array_equal(loaded[key], value)
    from_torch(other, loaded)
    assert_same(other, module)


def test_names_and_shapes_are_pytorchs():
    shapes = {
        name: tensor.shape for name, tensor in to_torch(new(MODULES["decoder_layer"])).items()
    }
    attention = {
        "in_proj_weight": (24, 8),
        "in_proj_bias": (24,),
        "out_proj.weight": (8, 8),
        "out_proj.bias": (8,),
    }
    assert shapes == {
        "resweight": (1,),
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        **{f"multihead_attn.{name}": shape for name, shape in attention.items()},
        "linear1.weight": (12, 8),
        "linear1.bias": (12,),
        "linear2.weight": (8, 12),
        "linear2.bias": (8,),
    }


def test_scanned_and_unrolled_stacks_and_their_layers_share_tensors():
    scanned, unrolled = new(MODULES["encoder"]), new(MODULES["encoder_unrolled"], 50)
    tensors = to_torch(scanned)
    from_torch(unrolled, tensors)
    for key, value in to_torch(unrolled).items():
        np.testing.assert_array_equal(value, tensors[key])
    layer = new(LAYER, 70)
    from_torch(layer, tensors, prefix="layers.1.")
    assert_same(layer, unrolled.layers.blocks[1])
    again = to_torch(layer, prefix="layers.1.")
    assert again.keys() == {key for key in tensors if key.startswith("layers.1.")}
    for key, value in again.items():
        np.testing.assert_array_equal(value, tensors[key])


def test_a_part_of_a_model_and_a_module_without_arrays():
    tensors = to_torch(new(LAYER), prefix="encoder.layers.0.") | {"embedding.weight": normal(0, 5)}
    layer = nnx.eval_shape(lambda: LAYER(rngs=nnx.Rngs(0)))
    from_torch(layer, tensors, prefix="encoder.layers.0.")
    assert_same(layer, new(LAYER))


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(kind, dtype, tmp_path):
    tensors = {key: value.astype(dtype) for key, value in to_torch(new(LAYER)).items()}
    save_tensors(tmp_path / f"weights.{kind}", tensors)
    loaded = load_tensors(tmp_path / f"weights.{kind}")
    in_file = np.float64 if dtype == np.float64 else np.float32
    assert {value.dtype for value in loaded.values()} == {np.dtype(in_file)}
    for given in (tensors, loaded):
        layer = new(LAYER, 50)
        from_torch(layer, given)
        for key, value in to_torch(layer).items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, tensors[key].astype(np.float32))


def test_files_hold_the_entries_in_their_order(tmp_path):
    """Also of arrays that do not lie row by row, and of one entry."""
    tensors = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array(3.0), "c": np.arange(8.0)[::2]}
    for path in (tmp_path / "a.safetensors", tmp_path / "a.npz"):
        save_tensors(path, tensors)
        for key, value in load_tensors(path).items():
            np.testing.assert_array_equal(value, tensors[key])


def sentence(f, *args, **kwargs):
    with pytest.raises(UserError) as error:
        f(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", ""])
def test_files_of_another_kind(suffix, tmp_path):
    path = (tmp_path / "weights").with_suffix(f".{suffix}" if suffix else "")
    for f in (load_tensors, partial(save_tensors, tensors={})):
        text = sentence(f, path)
        assert text.startswith(f"{path} is no .safetensors or .npz file; write one in PyTorch by ")
        assert "`from safetensors.torch import save_file`" in text
        assert '`save_file(model.state_dict(), "rezero.safetensors")`' in text


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_missing_and_damaged_files(kind, tmp_path):
    path = tmp_path / f"weights.{kind}"
    assert sentence(load_tensors, path).startswith(f"there is no file {path}; write it")
    assert f"{tmp_path / 'no' / path.name} cannot be written (No such file" in sentence(
        save_tensors, tmp_path / "no" / path.name, {}
    )
    save_tensors(path, {"a": np.random.default_rng(0).random(1000)})
    whole = path.read_bytes()
    for content in (b"", b"no such file" * 10, whole[:-20], whole[: len(whole) // 2], whole[:7]):
        path.write_bytes(content)
        assert f"{path} is damaged or no .{kind} file of arrays" in sentence(load_tensors, path)


def test_an_npz_file_with_a_flipped_bit_or_with_objects_or_a_single_array(tmp_path):
    path = tmp_path / "weights.npz"
    save_tensors(path, {"a": normal(0, 1000)})
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert "is damaged" in sentence(load_tensors, path)
    np.savez(path, a=np.array([None, {}], dtype=object))
    assert "file of arrays" in sentence(load_tensors, path)
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    assert "no .npz file" in sentence(load_tensors, path)


def test_numbers_that_numpy_lacks(tmp_path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    assert sentence(load_tensors, path) == (
        f"{path} holds numbers that NumPy lacks; write it from model.float().state_dict()"
    )


def test_wrong_names_shapes_and_numbers_change_nothing():
    layer, before = new(LAYER), new(LAYER)
    tensors = to_torch(new(LAYER, 50))
    how = "give that of a PyTorch model with the same layers, or make this module like it"

    def without(*names, **more):
        return {key: value for key, value in tensors.items() if key not in names} | more

    for given, text in (
        ({}, f'the state dict lacks "resweight"; {how}'),
        (without("linear2.bias"), f'the state dict lacks "linear2.bias"; {how}'),
        (
            without("resweight", resweigth=np.zeros(1)),
            f'the state dict lacks "resweight" (the closest name is "resweigth"); {how}',
        ),
        (
            tensors | {"norm1.weight": np.zeros(8)},
            f'the state dict has "norm1.weight", which this module lacks (the closest name is '
            f'"linear1.weight"); {how}',
        ),
        (tensors | {"q": np.zeros(1)}, f'the state dict has "q", which this module lacks; {how}'),
        (
            tensors | {"linear1.weight": np.zeros((8, 12))},
            '"linear1.weight" is (8, 12) in the state dict and (12, 8) in this module; make the '
            "module with the sizes of the PyTorch model",
        ),
        (
            tensors | {"resweight": np.zeros(())},
            '"resweight" is () in the state dict and (1,) in this module; make the module with the '
            "sizes of the PyTorch model",
        ),
        (
            tensors | {"linear2.bias": np.zeros(8, int)},
            '"linear2.bias" is int64; a parameter needs floating point numbers',
        ),
        (
            tensors | {"linear2.bias": {}},
            '"linear2.bias" is object; a parameter needs floating point numbers',
        ),
    ):
        assert sentence(from_torch, layer, given) == text
        assert_same(layer, before)
    assert sentence(from_torch, layer, tensors, prefix="encoder.") == (
        f'the state dict lacks "encoder.resweight"; {how}'
    )


@pytest.mark.parametrize("scan", [True, False])
def test_stacks_of_another_depth(scan):
    three = to_torch(new(MODULES["encoder"]))
    two, four = (new(partial(Encoder, 8, 2, n, feedforward=12, scan=scan)) for n in (2, 4))
    assert 'lacks "layers.3.resweight"' in sentence(from_torch, four, three)
    assert 'has "layers.2.resweight", which this' in sentence(from_torch, two, three)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"residual": rule},
            'no such rule; make the module with residual="rezero", "post_norm" or "pre_norm"',
        )
        for rule in ("residual", "plain", "gated", "rezero_channel", "gpt2_norm", "norm")
    ]
    + [
        (
            {"alpha_per": "sublayer"},
            'no gate for each sublayer; make the module with alpha_per="layer"',
        ),
        ({"rotary": True}, "no rotary positions; make the module with rotary=False"),
        ({"kv_heads": 1}, "no heads that share keys; make the module with kv_heads=None"),
    ],
)
@pytest.mark.parametrize("name", ["decoder_layer", "encoder", "encoder_unrolled"])
def test_modules_that_pytorch_lacks(name, options, text):
    module = nnx.eval_shape(lambda: MODULES[name](**options, rngs=nnx.Rngs(0)))
    for f in (to_torch, partial(from_torch, tensors={})):
        assert sentence(f, module) == f"PyTorch's layers have {text}"


def test_models_that_are_no_layers():
    model = nnx.eval_shape(lambda: MLP(4, 4, 1, 2, rngs=nnx.Rngs(0)))
    assert sentence(to_torch, model) == (
        "PyTorch's layers have no MLP; give an EncoderLayer, DecoderLayer, Encoder, Decoder or ViT"
    )


@pytest.mark.parametrize(
    ("case", "make"),
    [
        ("encoder", partial(EncoderLayer, 16, 4, 32)),
        ("decoder_plain", partial(DecoderLayer, 16, 4, 32)),
        ("post_norm", partial(EncoderLayer, 16, 4, 32, residual="post_norm")),
        ("pre_norm_decoder", partial(DecoderLayer, 16, 4, 32, residual="pre_norm")),
    ],
)
def test_stored_layers_of_pytorch_compute_the_same_here_and_come_back_to_the_bit(case, make):
    stored = np.load(Path(__file__).parent / "reference" / "transformer.npz")
    arrays = {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}
    layer = new(make)
    from_torch(layer, {k: v for k, v in arrays.items() if k.startswith("state/")}, prefix="state/")
    inputs = [arrays[name] for name in ("x", "memory") if name in arrays]
    causal = "mask" in arrays
    out = jax.jit(lambda layer, *inputs: layer(*inputs, is_causal=causal))(layer, *inputs)
    np.testing.assert_allclose(out, arrays["out"], rtol=1e-5, atol=1e-5)
    for name, value in to_torch(layer, prefix="state/").items():
        np.testing.assert_array_equal(value, arrays[name], err_msg=name)


def assert_output(module, arrays):
    """Rounding in float32 is relative to the largest of the numbers summed."""
    inputs = [arrays[name] for name in INPUTS if name in arrays]
    out = jax.jit(lambda module, inputs: module(*inputs))(module, inputs)
    bound = 1e-5 * np.abs(arrays["out"]).max()
    np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=bound)


@functools.cache
def stored():
    return dict(np.load(Path(__file__).parent / "reference" / "torch_layers.npz"))


@pytest.mark.guarantee("PyTorch parity")
@pytest.mark.parametrize(
    "name", ["pre_norm_decoder_layer", "encoder", "encoder_unrolled", "pre_norm_encoder"]
)
def test_stored_weights_and_outputs_of_pytorch(name):
    prefix = f"{name.removesuffix('_unrolled')}/"
    arrays = {k.removeprefix(prefix): v for k, v in stored().items() if k.startswith(prefix)}
    module = nnx.eval_shape(lambda: MODULES[name](rngs=nnx.Rngs(0)))
    from_torch(module, {k: v for k, v in arrays.items() if "state/" in k}, prefix="state/")
    assert_output(module, arrays)
    again = to_torch(module, prefix="state/")
    assert again.keys() == {k for k in arrays if "state/" in k}
    for key, value in again.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, arrays[key], err_msg=key)


@functools.cache
def pytorch():
    """The script that makes the stored numbers, with its models."""
    pytest.importorskip("torch", reason="PyTorch is not installed; the stored numbers are tested")
    pytest.importorskip("rezero", reason="rezero is not installed; the stored numbers are tested")
    from tests.reference import make_torch_layers

    return make_torch_layers


def test_the_stored_numbers_are_what_the_script_makes():
    fresh, kept = pytorch().all_references(), stored()
    assert fresh.keys() == kept.keys()
    for name, value in fresh.items():
        np.testing.assert_allclose(value, kept[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "without_bias"])
@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_pytorch_reads_ours_and_we_read_pytorchs(name, kind, tmp_path):
    model = pytorch().MODELS[name.removesuffix("_unrolled")]()
    import safetensors.torch
    import torch

    module, path = new(MODULES[name]), tmp_path / f"weights.{kind}"
    shapes = {k: v for k, v in INPUTS.items() if k == "x" or "decoder" in name}
    inputs = {k: normal(i, *shape) for i, (k, shape) in enumerate(shapes.items())}

    save_tensors(path, to_torch(module))
    read = load_tensors(path) if kind == "npz" else safetensors.torch.load_file(path)
    model.load_state_dict({k: torch.as_tensor(v) for k, v in read.items()}, strict=True)
    assert_output(module, inputs | {"out": pytorch().output(model, *inputs.values())})

    if kind == "npz":
        np.savez(path, **{k: v.float().cpu().numpy() for k, v in model.state_dict().items()})
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    for given in (load_tensors(path), model.state_dict()):
        again = nnx.eval_shape(lambda: MODULES[name](rngs=nnx.Rngs(0)))
        from_torch(again, given)
        assert_same(again, module)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_state_dicts_of_pytorch(dtype, tmp_path):
    model = pytorch().MODELS["encoder_layer"]()
    import torch
    from safetensors.torch import save_file

    state = model.to(getattr(torch, dtype)).state_dict()
    save_file(state, tmp_path / "half.safetensors")
    layer = new(LAYER)
    from_torch(layer, load_tensors(tmp_path / "half.safetensors"))
    for key, value in to_torch(layer).items():
        np.testing.assert_array_equal(value, state[key].float().numpy())
