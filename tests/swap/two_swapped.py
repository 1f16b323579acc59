# SPDX-License-Identifier: Apache-2.0
"""Run under torchrun by test_swap_training: swapped models under DDP and FSDP2."""

from __future__ import annotations

import torch
from support.hf_models import tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ctxfast
from ctxfast.training.loop.parallel import join

IDS = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5, [1] * 5 + [0] * 2])
LABELS = torch.tensor([0, 1, 1, 0])


def steps(model: nn.Module, wrapped: nn.Module, rows: slice) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = wrapped(IDS[rows], attention_mask=MASK[rows], labels=LABELS[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
        for name, value in model.named_parameters()
    }


if __name__ == "__main__":
    group = join("ddp", "cpu")
    alone = tiny_model("Bert", "ForSequenceClassification").train()
    steps(alone, alone, slice(None))
    for kind in ("ddp", "fsdp2 root", "fsdp2 layers"):
        model = tiny_model("Bert", "ForSequenceClassification").train()
        assert ctxfast.swap_in(model).swapped
        wrapped: nn.Module = model
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.bert.encoder.layer if kind == "fsdp2 layers" else ():
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        steps(model, wrapped, slice(group.rank, None, 2))
        found = whole(model)
        for name, value in alone.named_parameters():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-4)
        print(f"{kind}: as one process", flush=True)
    group.leave()
