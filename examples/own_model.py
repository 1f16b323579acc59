# SPDX-License-Identifier: Apache-2.0
"""A text encoder of one's own on ``ctxfast.functional``: packed once at the edge, no padding inside.

    python examples/own_model.py --layers 4 --hidden 256

The same layer is written twice, with torch's padded modules' arithmetic and with ctxfast's ops.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctxfast
from ctxfast.packing import Packing


class Layer(nn.Module):
    """One post-LayerNorm transformer layer."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def padded(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, N) with a (B, L) bool mask, in plain PyTorch."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        x = self.norm1(self.out(context.transpose(1, 2).flatten(2)) + x)
        return self.norm2(self.narrow(F.gelu(self.wide(x))) + x)

    def packed(self, x: Tensor, packing: Packing) -> Tensor:
        """(T, N): the tokens of all texts one after another."""
        qkv = ctxfast.linear_act(x, self.qkv.weight).unflatten(-1, (3, self.heads, -1))
        bias = self.qkv.bias.view(3, self.heads, -1)
        context = ctxfast.attention(qkv, packing.cu_seqlens, packing.max_seqlen, bias)
        out = ctxfast.linear_act(context.flatten(1), self.out.weight)
        x = ctxfast.add_layer_norm(out, x, self.norm1.weight, self.norm1.bias, self.out.bias, eps=self.norm1.eps)
        narrow = ctxfast.feed_forward(x, self.wide.weight, self.wide.bias, self.narrow.weight, activation="gelu")
        return ctxfast.add_layer_norm(
            narrow, x, self.norm2.weight, self.norm2.bias, self.narrow.bias, eps=self.norm2.eps
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(args.hidden, args.heads) for _ in range(args.layers)).eval()
    lengths = torch.randint(1, args.longest + 1, (args.texts,))
    lengths[0] = args.longest
    mask = torch.arange(args.longest) < lengths[:, None]
    x = torch.randn(args.texts, args.longest, args.hidden)

    def padded() -> Tensor:
        y = x
        for layer in layers:
            y = layer.padded(y, mask)
        return y

    def packed() -> Tensor:
        packing = Packing.from_mask(mask)
        y = packing.pack(x)
        for layer in layers:
            y = layer.packed(y, packing)
        return packing.unpack(y)

    seconds, outputs = {}, {}
    with torch.inference_mode():
        for name, run in (("padded", padded), ("packed", packed)):
            run()
            start = time.perf_counter()
            outputs[name] = run()
            seconds[name] = time.perf_counter() - start
    difference = float((outputs["padded"] - outputs["packed"])[mask].abs().max())
    before, after = seconds["padded"], seconds["packed"]
    print(ctxfast.explain("attention", torch.zeros(1, 3, args.heads, 64), torch.tensor([0, 1], dtype=torch.int32), 1))
    print(f"before {before:.3f} s, after {after:.3f} s ({before / after:.2f}x), largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
