"""The peers: two causal byte-level language models in PyTorch.

Needs the environment of benchmarks/requirements.txt; nothing of rezero_jax is imported. `official`
is made of the authors' own ReZero layers, from the package rezero; `x-transformers` is the decoder
of that package, with LayerNorm before each branch and without biases in the attention, for it has
neither ReZero nor such biases.
"""

import argparse
import math

import torch
from rezero.transformer import RZTXEncoderLayer
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from benchmarks.torch_step import finish, in_bfloat16, serve_training, use_gpu
from benchmarks.worker import serve

VOCABULARY = 256
PROMPT = 16
PEERS = (
    "official",
    "official-compile",
    "official-compile-graphs",
    "x-transformers",
    "x-transformers-flash",
    "x-transformers-flash-compile",
)


class OfficialLM(nn.Module):
    """Embedding times sqrt(width), sinusoidal positions, the authors' layers, linear head.

    Args:
      depth, width, heads: of the layers; the feed-forward networks are four times wider.
      length: the longest sequence.
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
        # Added to the scores as it is: a bool mask would be turned into this one in every layer.
        mask = nn.Transformer.generate_square_subsequent_mask(length, torch.get_default_device())
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (batch, time) to logits (batch, time, VOCABULARY)."""
        length, width = tokens.shape[1], self.embedding.embedding_dim
        # The layers want the time first.
        x = self.embedding(tokens.T) * math.sqrt(width) + self.positions[:length]
        mask = self.mask[:length, :length]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x.transpose(0, 1))


def x_transformers_lm(depth: int, width: int, length: int, heads: int, flash: bool) -> nn.Module:
    """The other peer, of the same sizes."""
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


def make_model(peer: str, depth: int, width: int, length: int, heads: int = 8) -> nn.Module:
    """One of PEERS: maps tokens (batch, time) to logits (batch, time, VOCABULARY)."""
    if peer.startswith("official"):
        return OfficialLM(depth, width, length, heads)
    return x_transformers_lm(depth, width, length, heads, flash="flash" in peer)


def generate(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """The `count` tokens that follow `prompt` (batch, time), each the likeliest one."""
    if isinstance(model, TransformerWrapper):  # it has a cache of keys and values
        return AutoregressiveWrapper(model).generate(prompt, count, temperature=0.0)
    tokens = prompt
    with torch.inference_mode():
        for _ in range(count):
            token = model(tokens)[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat((tokens, token), dim=1)
    return tokens[:, prompt.shape[1] :]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description="Serves timings of training steps, or of generating tokens."
    )
    modes = [peer + suffix for peer in PEERS for suffix in ("", "-fused")]
    parser.add_argument("mode", choices=modes, help="-fused: AdamW with fused=True")
    parser.add_argument("depth", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("length", type=int, help="tokens of a sequence, a prompt included")
    parser.add_argument("batch", type=int, nargs="?", help="sequences a training step")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument(
        "--generate",
        action="store_true",
        help=f"a step is one more token of a sequence that starts with {PROMPT} bytes",
    )
    args = parser.parse_args()
    use_gpu()
    torch.manual_seed(0)
    peer = args.mode.removesuffix("-fused")
    model = make_model(peer, args.depth, args.width, args.length, args.heads)
    model.to(torch.get_default_device())  # the official layers make their gates on the CPU

    if args.generate:
        if args.batch is not None or "compile" in args.mode or "fused" in args.mode:
            parser.error("--generate takes no batch, and a mode without -compile and -fused")
        model.eval()
        prompt = torch.randint(VOCABULARY, (1, PROMPT))

        def tokens(count: int) -> None:
            assert PROMPT + count <= args.length, "no positions for so many tokens"
            with in_bfloat16():
                generate(model, prompt, count)
            finish()

        serve(tokens)
        return
    if args.batch is None:
        parser.error("training needs a batch")

    fused = args.mode.endswith("-fused") or None
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=fused)
    sequences = torch.randint(VOCABULARY, (16, args.batch, args.length + 1))
    inputs, targets = sequences[..., :-1], sequences[..., 1:].flatten(1)
    flat = nn.Sequential(model, nn.Flatten(0, 1))  # logits in the shape of the targets
    serve_training(flat, optimizer, inputs, targets, mode=peer, half=True)


if __name__ == "__main__":
    main()
