# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: rows (op or model, workload, sizes), spread over dtypes, passes and devices.

The rows of an op stand in ``ops/<op>.py``, those of a whole model in ``models/<model>.py``, beside everything else that
the suite knows of it. Such a file holds

- ``ROWS``, the workloads; ``make(random, **sizes)``, the keyword arguments of the op's public function, so that
  whatever is registered for the op runs them, or the inputs of the model;
- ``work(sizes, itemsize, backward)``, the ``Work`` of a case, ``itemsize`` being the bytes of an element (of weights,
  where they are held in another dtype than the inputs);
- ``PEERS``, the providers that it is compared with;
- an op: ``TINY``, sizes for tests, and ``GRADS``, the arguments whose gradients a forward+backward case computes and
  checks, unless it has no such case;
- a model: ``OURS`` and ``COMPILED``, more providers, and ``oracle(case, args)``, the right outputs.

Inputs are drawn on the CPU in float32 from a fixed seed and only then moved and rounded: every device and dtype sees
the same numbers. Letters are those of ``ctxfast.functional``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ctxfast import functional as functional  # enters all ops in the table
from ctxfast._core import registry

from .arrivals import Arrivals

SEED = 20180215
_SETS = {"small": ("small",), "full": ("small", "full"), "latency": ("latency",)}
MODELS = tuple(sorted(path.stem for path in (Path(__file__).parent / "models").glob("[!_]*.py")))


@dataclass(frozen=True)
class Row:
    """One workload of an op or model.

    ``passes``: "f" forward, "fb" forward and backward. ``size``: "small" rows are run by the small and the full set,
    "latency" rows by the set of that name alone. ``arrivals``: how calls come; None: one after another.
    ``cpu`` and ``cuda`` list the dtypes measured there; an empty one leaves the device out. "float32+bf16" and
    "float32+int8" stand for float32 inputs with ``weight_dtype=torch.bfloat16`` and ``torch.int8``.
    """

    workload: str
    sizes: dict[str, Any]
    size: str = "full"
    passes: tuple[str, ...] = ("f",)
    cpu: tuple[str, ...] = ("float32",)
    cuda: tuple[str, ...] = ("float16", "bfloat16")
    arrivals: Arrivals | None = None


@dataclass(frozen=True)
class Work:
    """The work a case needs at least; padding and repeated work count for nobody.

    Floating-point operations (a multiply-add is two), bytes moved, tokens; None where it would say nothing. A case
    declares ``flops`` if arithmetic bounds it and ``bytes`` if memory does. A recurrence declares its ``steps``, which
    wait for one another, and ``step_bytes``, the weights that each of them multiplies by.
    """

    flops: float | None = None
    bytes: float | None = None
    tokens: int | None = None
    steps: int | None = None
    step_bytes: float | None = None


def module(op: str) -> ModuleType:
    """The file of an op or model."""
    return importlib.import_module(f"{__package__}.{'models' if op in MODELS else 'ops'}.{op}")


def names() -> list[str]:
    """Every op of the op table, then every model: the order on pages."""
    return [*registry.OPS, *MODELS]


@dataclass(frozen=True)
class Case:
    """One measurement: a row in one dtype, one pass, on one device kind. ``id`` names it in files and on screens."""

    op: str
    workload: str
    sizes: dict[str, Any]
    dtype_name: str
    backward: bool
    device: str
    size: str
    arrivals: Arrivals | None = None

    @property
    def id(self) -> str:
        return f"{self.op}/{self.workload}/{self.dtype_name}/{self.pass_name}/{self.device}"

    @property
    def pass_name(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def is_model(self) -> bool:
        return self.op in MODELS

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name.partition("+")[0])

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """What ctxfast is asked to round the factors of products to, the inputs being float32."""
        return {"": None, "bf16": torch.bfloat16, "int8": torch.int8}[self.dtype_name.partition("+")[2]]

    @property
    def grads(self) -> tuple[str, ...]:
        """Arguments whose gradient a forward+backward case computes and checks."""
        return module(self.op).GRADS if self.backward else ()

    @property
    def work(self) -> Work:
        """Arithmetic, memory traffic and tokens that the case needs, whoever runs it."""
        return module(self.op).work(self.sizes, (self.weight_dtype or self.dtype).itemsize, self.backward)

    @property
    def timed_only(self) -> dict[str, Any]:
        """Arguments that only the timed calls get: with dropout on, results have nothing to be held to."""
        return {"dropout_p": self.sizes["dropout"]} if "dropout" in self.sizes else {}

    def make(self) -> dict[str, Any]:
        """The keyword arguments of the public function (an op), or the inputs of a model."""
        args = module(self.op).make(torch.Generator().manual_seed(SEED), **self.sizes)
        args = {name: _place(value, self.device, self.dtype) for name, value in args.items()}
        if self.weight_dtype is not None:
            args["weight_dtype"] = self.weight_dtype
        for name in self.grads:
            value = args[name]
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor is not None:
                    tensor.requires_grad_()
        return args


def _place(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return tuple(_place(item, device, dtype) for item in value)
    return value


def select(
    device: str = "cpu",
    size: str = "small",
    ops: Iterable[str] = (),
    models: bool = False,
    workloads: Iterable[str] = (),
) -> list[Case]:
    """The cases of a device and set, in the order of pages.

    Args:
        size: "small", "full" (which holds the small ones too) or "latency".
        ops: names of ops or models to keep; none for every op.
        models: also the whole-model cases (naming a model in ``ops`` has the same effect for it).
        workloads: keep cases whose id holds one of these texts; none for all.
    """
    ops, workloads = tuple(ops), tuple(workloads)
    for name in ops:
        if name not in names():
            raise ValueError(f"benchmarks: there is no op {name!r}; expected one of {', '.join(sorted(names()))}.")
    wanted = {*(ops or registry.OPS), *(MODELS if models else ())}
    found = []
    for op in names():
        for row in module(op).ROWS if op in wanted else ():
            if row.size not in _SETS[size]:
                continue
            for dtype_name in getattr(row, device):
                for name in row.passes:
                    case = Case(op, row.workload, row.sizes, dtype_name, name == "fb", device, row.size, row.arrivals)
                    if not workloads or any(text in case.id for text in workloads):
                        found.append(case)
    return found
