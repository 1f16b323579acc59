# SPDX-License-Identifier: Apache-2.0
"""One process or many: who we are, and a model spread over all (DDP, FSDP2)."""

from __future__ import annotations

import atexit
import contextlib
import copy
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# How long processes wait while the first one prepares data.
_PATIENCE = timedelta(days=7)
# How long a process waits at its end for gloo's threads, which need a moment.
_MOST_SECONDS_TO_IDLE = 60
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

    def after_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, where the first call of it makes files: process 0 makes them, then all find them.

        Raises:
            Exception: what ``make`` raised in process 0, in all of them: none is left waiting.
        """
        if self.ranks == 1:
            return make()
        # Making may take hours; the group's own patience is minutes.
        patient: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        made, problem = None, None
        if self.is_first:
            try:
                made = make()
            except Exception as error:
                problem = error
        said = [problem]
        dist.broadcast_object_list(said, src=0, group=patient, device=torch.device("cpu"))
        dist.destroy_process_group(patient)
        if said[0] is not None:
            raise said[0]
        return made if self.is_first else make()

    def leave(self) -> None:
        """Part, at a program's end: a process that ends while others still listen to it may take them down."""
        if dist.is_initialized():
            dist.barrier()
            _await_gloo()
            dist.destroy_process_group()


def _await_gloo() -> None:
    """Return when gloo's threads have let go of their last tasks: one that comes late takes the process down.

    Such a thread drops the tensors of a task some time after those who waited for the task went on, and takes Python's
    lock to do so. If Python shuts down meanwhile, it ends the thread in the midst of a destructor, and the process
    aborts: "terminate called without an active exception". If a model under DDP is dropped meanwhile, which ends the
    last group, both wait for each other for ever. Leaving the group is not enough: torch.distributed.nn's default
    arguments and the caches of FSDP2 may hold it to the end.
    """
    end = time.monotonic() + _MOST_SECONDS_TO_IDLE
    while not (_is_gloo_idle() and _is_gloo_idle()) and time.monotonic() < end:
        pass


def _is_gloo_idle() -> bool:
    """Whether all of gloo's threads sleep after a moment in which they could have had Python's lock."""
    time.sleep(0.001)
    for file in Path("/proc/self/task").glob("*/stat"):  # empty where there is no /proc
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            name, _, state = file.read_text().partition("(")[2].rpartition(") ")
            if name.startswith("pt_gloo") and state[0] != "S":
                return False
    return True


def device_of(device: str = "auto") -> torch.device:
    """The device that a name stands for.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda".

    Raises:
        ValueError: an unknown device.
        RuntimeError: a GPU is asked for and there is none.
    """
    who = "ctxfast.training"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"{who}: device is {device!r}; expected 'auto', 'cpu' or 'cuda'.")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{who}: device is {device!r} and torch sees no GPU; expected one, or device='cpu'.")
    return place


def join(kind: str = "auto", device: str = "auto") -> Group:
    """Find out which process of how many this is; under torchrun, join the others.

    Args:
        kind: "auto" (DDP under torchrun, else one process), "no", "ddp", "fsdp2".
        device: "auto" (a GPU if there is one), "cpu", "cuda".

    Raises:
        ValueError: an unknown kind or device; several processes and kind "no"; "ddp" or "fsdp2" outside torchrun.
        RuntimeError: a GPU is asked for and there is none.
    """
    who = "ctxfast.training"
    if kind not in PARALLEL:
        raise ValueError(f"{who}: parallel is {kind!r}; expected one of {', '.join(PARALLEL)}.")
    is_many = dist.is_initialized() or dist.is_torchelastic_launched()
    if kind == "auto":
        kind = "ddp" if is_many else "no"
    place = device_of(device)
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
    # Also where a program ends by an error or Ctrl-C, and where it goes on after `leave`.
    atexit.unregister(_await_gloo)
    atexit.register(_await_gloo)
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
        self.model: Any = model  # a module, DDP around it, or one to which FSDP2 gave methods
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
        norm: Any = nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """State of model and optimiser, whole and on the CPU (rank 0; elsewhere empty). Called by every process."""
        if self.group.kind != "fsdp2":
            return self.plain.state_dict(), optimizer.state_dict()
        moments = optimizer.state_dict()
        moments["state"] = {
            index: {name: _full(value) for name, value in own.items()} for index, own in moments["state"].items()
        }
        return {name: _full(value) for name, value in _tensors(self.plain).items()}, moments

    def load(self, optimizer: torch.optim.Optimizer, model_state: dict[str, Any], state: dict[str, Any]) -> None:
        """What ``state`` gave, put back. Every process gives the same."""
        if self.group.kind != "fsdp2":
            self.plain.load_state_dict(model_state)
            optimizer.load_state_dict(state)
            return
        _fill(_tensors(self.plain), model_state)
        parameters = [parameter for part in optimizer.param_groups for parameter in part["params"]]
        moments = {
            index: {name: _as_spread(value, parameters[index]) for name, value in own.items()}
            for index, own in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": moments})

    def whole(self) -> nn.Module:
        """The model with plain parameters: on rank 0 a copy on the CPU for FSDP2, else itself. Called by everyone."""
        if self.group.kind != "fsdp2":
            return self.plain
        state = {name: _full(value) for name, value in _tensors(self.plain).items()}
        if self._whole is None:
            return self.plain
        _fill(_tensors(self._whole), state)
        return self._whole


# By the names of parameters, not of the state_dict, which a module may write in another form (BERT's: query, key and
# value apart).


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _full(value: Any) -> Any:
    """A sharded tensor as a whole one on the CPU; every process calls it."""
    value = value.detach() if isinstance(value, Tensor) else value
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def _as_spread(value: Any, like: Any) -> Any:
    """A whole tensor sharded as ``like`` is, if it has its shape."""
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(_as_spread(values[name], tensor))
