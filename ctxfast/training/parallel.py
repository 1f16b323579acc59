# SPDX-License-Identifier: Apache-2.0
"""One process or many: who we are, and a model spread over all (DDP, FSDP2)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PARALLEL = ("auto", "no", "ddp", "fsdp2")


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank, ranks: this process and how many there are.
        device: the one it computes on.
        kind: "no", "ddp" or "fsdp2".
    """

    rank: int
    ranks: int
    device: torch.device
    kind: str

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, value: float) -> float:
        """Sum of a number over all processes."""
        if self.ranks == 1:
            return value
        figure = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(figure)
        return figure.item()

    def any(self, value: bool) -> bool:
        """Whether it is true in some process."""
        return self.total(float(value)) > 0

    def add(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def all(self, value: Any) -> list[Any]:
        """Everyone's value, in order of rank."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """Rank 0's value, for everyone."""
        if self.ranks == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        if self.ranks > 1:
            dist.barrier()


def join(kind: str = "auto", device: str = "auto") -> Group:
    """Find out which process of how many this is; under torchrun, join the others.

    Args:
        kind: "auto" (DDP under torchrun, else one process), "no", "ddp", "fsdp2".
        device: "auto" (a GPU if there is one), "cpu", "cuda".

    Raises:
        ValueError: an unknown kind; several processes and kind "no"; "ddp" or "fsdp2" outside torchrun.
        RuntimeError: a GPU is asked for and there is none.
    """
    who = "ctxfast.training"
    if kind not in PARALLEL:
        raise ValueError(f"{who}: parallel is {kind!r}; expected one of {', '.join(PARALLEL)}.")
    is_many = dist.is_initialized() or dist.is_torchelastic_launched()
    if kind == "auto":
        kind = "ddp" if is_many else "no"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{who}: device is {device!r} and torch sees no GPU; expected one, or device='cpu'.")
    if kind == "no":
        if is_many:
            raise ValueError(f"{who}: parallel is 'no' under torchrun; expected 'ddp' or 'fsdp2', or a plain start.")
        return Group(0, 1, place, kind)
    if not is_many:
        raise ValueError(f"{who}: parallel is {kind!r} in a lone process; start it by torchrun --nproc-per-node N.")
    if place.type == "cuda":
        if not dist.is_initialized():
            torch.cuda.set_device(dist.get_node_local_rank())
        place = torch.device("cuda", torch.cuda.current_device())
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Group(dist.get_rank(), dist.get_world_size(), place, kind)


class Spread:
    """A model as the processes of a group train it.

    Args:
        model: on the group's device. FSDP2 shards it in place.
        group: from ``join``.

    Attributes:
        model: the module to call in training.
        plain: the module to evaluate with: the model itself.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.group = group
        self.plain = model
        self.model: nn.Module = model
        self._whole: nn.Module | None = None  # FSDP2: an unsharded copy on rank 0, to save from
        if group.kind == "ddp":
            places = [group.device.index] if group.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(model, device_ids=places)
        elif group.kind == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            if group.is_first:
                self._whole = copy.deepcopy(model).to("cpu")
            mesh = init_device_mesh(group.device.type, (group.ranks,))
            for part in model.modules():
                if isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(layer) for layer in part}) == 1:
                    for layer in part:
                        if any(True for _ in layer.parameters()) and type(layer).forward is not nn.Module.forward:
                            fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def local(self, is_local: bool) -> Iterator[None]:
        """Within, gradients stay in this process if ``is_local``: more micro-batches of the step follow."""
        if self.group.kind == "ddp" and is_local:
            with self.model.no_sync():
                yield
        elif self.group.kind == "fsdp2":
            self.model.set_requires_gradient_sync(not is_local)
            yield
        else:
            yield

    def clip(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Norm of all gradients, which are scaled down to ``max_norm`` if it is given."""
        norm = nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """State of model and optimiser, whole and on the CPU (rank 0; elsewhere empty). Called by every process."""
        if self.group.kind != "fsdp2":
            return self.plain.state_dict(), optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_state_dict(self.plain, optimizer, options=options)

    def load(self, optimizer: torch.optim.Optimizer, model_state: dict[str, Any], state: dict[str, Any]) -> None:
        """What ``state`` gave, put back. Every process gives the same."""
        if self.group.kind != "fsdp2":
            self.plain.load_state_dict(model_state)
            optimizer.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_state_dict(self.plain, optimizer, model_state_dict=model_state, optim_state_dict=state, options=options)

    def whole(self) -> nn.Module:
        """The model with plain parameters: on rank 0 a copy on the CPU for FSDP2, else itself. Called by everyone."""
        if self.group.kind != "fsdp2":
            return self.plain
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.plain, options=options)
        if self._whole is None:
            return self.plain
        self._whole.load_state_dict(state)
        return self._whole
