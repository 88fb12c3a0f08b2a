"""Two causal byte-level language models in PyTorch.

This module needs benchmarks/requirements.txt, and imports nothing of rezero_jax. "official"
consists of the authors' ReZero layers, from the package rezero. "x-transformers" is the decoder of
that package, which is pre-norm and has neither ReZero nor biases in the attention.
"""

import math

import torch
from rezero.transformer import RZTXEncoderLayer
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

VOCABULARY = 256


class OfficialLM(nn.Module):
    """Embedding times sqrt(width), sinusoidal positions, the authors' layers, linear head.

    Args:
      depth, width, heads: sizes of the layers; the feed-forward networks are four times wider.
      length: longest sequence.
    """

    positions: Tensor
    mask: Tensor

    def __init__(self, depth: int, width: int, length: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(
            RZTXEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu")
            for _ in range(depth)
        )
        self.head = nn.Linear(width, VOCABULARY)
        angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        positions = torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(length, 1, width)
        # A float mask, because every layer would convert a bool mask.
        mask = nn.Transformer.generate_square_subsequent_mask(length, torch.get_default_device())
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (batch, time) to logits (batch, time, VOCABULARY)."""
        length, width = tokens.shape[1], self.embedding.embedding_dim
        # The layers take the time axis first.
        x = self.embedding(tokens.T) * math.sqrt(width) + self.positions[:length]
        mask = self.mask[:length, :length]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x.transpose(0, 1))


def x_transformers_lm(depth: int, width: int, length: int, heads: int, flash: bool) -> nn.Module:
    """The decoder of x-transformers in the same sizes."""
    layers = Decoder(
        dim=width,
        depth=depth,
        heads=heads,
        attn_dim_head=width // heads,
        attn_flash=flash,
        ff_mult=4,
    )
    return TransformerWrapper(
        num_tokens=VOCABULARY,
        max_seq_len=length,
        attn_layers=layers,
        scaled_sinu_pos_emb=True,
        to_logits=nn.Linear(width, VOCABULARY),
    )


def make_model(mode: str, depth: int, width: int, length: int, heads: int = 8) -> nn.Module:
    """The network of a mode: maps tokens (batch, time) to logits (batch, time, VOCABULARY)."""
    if mode.startswith("official"):
        return OfficialLM(depth, width, length, heads)
    return x_transformers_lm(depth, width, length, heads, flash="flash" in mode)


def generate(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """Greedily generates `count` tokens after `prompt` (batch, time)."""
    if isinstance(model, TransformerWrapper):  # has a KV cache
        return AutoregressiveWrapper(model).generate(prompt, count, temperature=0.0)
    tokens = prompt
    with torch.inference_mode():
        for _ in range(count):
            token = model(tokens)[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat((tokens, token), dim=1)
    return tokens[:, prompt.shape[1] :]
