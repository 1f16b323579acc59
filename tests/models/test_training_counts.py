# SPDX-License-Identifier: Apache-2.0
"""What a training step asks of a GPU, counted on a stand-in for one: kernels, products and conversions of dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).resolve().parents[1]

PROGRAM = """
import collections, json
from support import fake_triton
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import ctxfast
from ctxfast._core import torch_ops
from ctxfast.models.bert.heads import BertForMaskedLM
from ctxfast.ops.transformer_layers import triton as layers

torch_ops.must_dispatch = lambda: False  # the mode below sees what is inside of a layer
# As on a GPU, where the product itself gives float32.
layers._of_weight = lambda grad, x, is_mixed: grad.t().mm(x).view(-1).new_empty(
    (grad.shape[1], x.shape[1]), dtype=torch.float32 if is_mixed else None
)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen["mm" if name == "addmm" else name] += 1
        return func(*args, **(kwargs or {}))


def counted(count):
    config = ctxfast.BertConfig(
        vocab_size=16, hidden_size=64, num_hidden_layers=count, num_attention_heads=2, intermediate_size=128
    )
    model = BertForMaskedLM(config).train()
    ids = torch.randint(1, 16, (2, 4))
    with Count() as mode:
        fake_triton.launches.clear()
        with torch.autocast("cpu", torch.float16), ctxfast.use_impl(transformer_layers="triton"):
            loss = model(ids, labels=ids, labelled=torch.arange(8)).loss
        loss.backward()
    seen = mode.seen
    return [len(fake_triton.launches), *(seen[name] for name in ("mm", "_to_copy", "randint", "_foreach_copy_", "add"))]


counted(1)
print(json.dumps([counted(2), counted(5)]))
"""


def test_a_layer_is_twelve_products_and_eleven_launches(tmp_path) -> None:
    """Four products and four kernels forward; eight products and, with sums of columns, seven kernels backward. What
    is converted, drawn and added up besides does not grow with the layers."""
    program = tmp_path / "counts.py"
    program.write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two, five = json.loads(done.stdout.splitlines()[-1])
    launches, products, casts, drawn, copies, sums = [(b - a) / 3 for a, b in zip(two, five)]
    assert (launches, products) == (11, 12)
    assert (casts, drawn, copies, sums) == (0, 0, 0, 0)
    assert two[2] <= 16 and two[3] == 2 and two[4] == 1, two
