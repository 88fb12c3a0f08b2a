"""The reference code of DeepNorm, Sub-LN and LayerScale.

DeepNorm and Sub-LN are layers of torchscale's Encoder, LayerScale is timm's Block with
`init_values`; the layers run one after another. For each case: `params/` and `grads/` by the names
and in the layout of `rezero_jax.Encoder`, layers stacked on the first axis; the input `x`, its
gradient `grad_x`, and the output `out`. Gradients are those of sum(out * cotangent). Every
parameter is random, norms and biases too. torchscale's GELU computes in float32.

A case init/NAME has the factors by which torchscale multiplies its initial weights, in its own
names, for an encoder of 3 layers and, under decoder/, for the decoder of an encoder and a decoder
of 3 layers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchscale.architecture.config import DecoderConfig, EncoderConfig
from torchscale.architecture.decoder import Decoder
from torchscale.architecture.encoder import Encoder

WIDTH, HEADS, HIDDEN, DEPTH = 8, 2, 12, 2
CASES = ("deep_norm", "sub_norm", "layerscale", "init/deep_norm", "init/sub_norm")
OPTIONS = {"deep_norm": {"deepnorm": True}, "sub_norm": {"subln": True}}
PLAIN = {"subln": False}  # torchscale's default is Sub-LN

Get = Callable[[str], np.ndarray]  # the array of a name, or its gradient


def torchscale(part: str, name: str, layers: int) -> nn.Module:
    """torchscale's "encoder", or "decoder" beside an encoder, under a rule; "" is the plain one."""
    sizes = {"embed_dim": WIDTH, "attention_heads": HEADS, "ffn_embed_dim": HIDDEN}
    options: dict[str, Any] = {f"{part}_{k}": v for k, v in sizes.items()}
    options |= {f"{part}_layers": layers, "no_output_layer": True, "vocab_size": -1}
    options |= OPTIONS.get(name, PLAIN)
    if part == "encoder":
        return Encoder(EncoderConfig(activation_fn="gelu", **options))
    return Decoder(DecoderConfig(**options), is_encoder_decoder=True)


def packed(matrices: list[np.ndarray]) -> np.ndarray:
    """(width out, width in) of queries, keys and values as (in, heads, 3, size)."""
    each = [m.reshape(HEADS, WIDTH // HEADS, -1).transpose(2, 0, 1) for m in matrices]
    return np.stack(each, axis=2)


def layer_arrays(case: str, get: Get) -> dict[str, np.ndarray]:
    """The arrays of one layer by our names."""
    if case == "layerscale":
        qkv, qkv_bias = np.split(get("attn.qkv.weight"), 3), np.split(get("attn.qkv.bias"), 3)
        out, up, down, norms = "attn.proj", "mlp.fc1", "mlp.fc2", ("norm1", "norm2")
    else:
        projections = [f"self_attn.{part}_proj" for part in "qkv"]
        qkv = [get(f"{name}.weight") for name in projections]
        qkv_bias = [get(f"{name}.bias") for name in projections]
        out, up, down = "self_attn.out_proj", "ffn.fc1", "ffn.fc2"
        norms = ("self_attn_layer_norm", "final_layer_norm")
    arrays = {
        "attention/qkv": packed(qkv),
        "attention/qkv_bias": packed([bias[:, None] for bias in qkv_bias])[0],
    }
    for ours, theirs in (
        ("attention/out", out),
        ("feedforward/up", up),
        ("feedforward/down", down),
    ):
        arrays[f"{ours}/kernel"] = get(f"{theirs}.weight").T
        arrays[f"{ours}/bias"] = get(f"{theirs}.bias")
    pairs = [(f"rules/{i}/norm", theirs) for i, theirs in enumerate(norms)]
    if case == "sub_norm":
        pairs.append(("attention/norm", "self_attn.inner_attn_ln"))
        pairs.append(("feedforward/norm", "ffn.ffn_layernorm"))
    for ours, theirs in pairs:
        arrays |= {f"{ours}/scale": get(f"{theirs}.weight"), f"{ours}/bias": get(f"{theirs}.bias")}
    if case == "layerscale":
        arrays |= {f"rules/{i}/alpha": get(f"ls{i + 1}.gamma") for i in (0, 1)}
    return arrays


def reference(case: str) -> dict[str, np.ndarray]:
    """The factors of an init case; parameters, output and gradients of another."""
    if case.startswith("init/"):
        name = case.removeprefix("init/")
        decoder = {f"decoder/{k}": v for k, v in factors("decoder", name).items()}
        return factors("encoder", name) | decoder
    torch.manual_seed(CASES.index(case))
    if case == "layerscale":
        options = {"mlp_ratio": HIDDEN / WIDTH, "qkv_bias": True, "init_values": 0.1}
        layers = [Block(WIDTH, HEADS, **options) for _ in range(DEPTH)]
    else:
        layers = list(torchscale("encoder", case, DEPTH).layers)
    modules = nn.ModuleList(layers).double().eval()
    for parameter in modules.parameters():
        nn.init.uniform_(parameter, -1, 1)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    out: Tensor = x
    for layer in modules:
        out = layer(out) if case == "layerscale" else layer(out, encoder_padding_mask=None)[0]
    (out * cotangent).sum().backward()
    arrays = {"x": x, "grad_x": x.grad, "cotangent": cotangent, "out": out}
    result = {name: value.detach().numpy() for name, value in arrays.items()}
    for kind in ("params", "grads"):
        each = []
        for layer in modules:
            named = dict(layer.named_parameters())
            tensors = {k: p.detach() if kind == "params" else p.grad for k, p in named.items()}
            each.append(layer_arrays(case, lambda name, t=tensors: t[name].numpy()))
        result |= {f"{kind}/{name}": np.stack([one[name] for one in each]) for name in each[0]}
    return result


def factors(part: str, rule: str) -> dict[str, np.ndarray]:
    """What the rule multiplies the initial weights of the first of 3 layers by."""
    plain, scaled = (
        (torch.manual_seed(0), dict(torchscale(part, name, 3).layers[0].named_parameters()))[1]
        for name in ("", rule)
    )
    return {
        name: np.float32((scaled[name] / plain[name]).median().item())
        for name in plain
        if name.endswith("weight") and "norm" not in name and "_ln" not in name
    }
