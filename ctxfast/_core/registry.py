# SPDX-License-Identifier: Apache-2.0
"""The op table.

Every op is declared once, by its public function under ``calls.op``: its reference (plain PyTorch, the definition), its
other implementations in order of preference, its argument check, its autocast rule. Parity tests, benchmarks,
``explain`` and ``ctxfast info`` walk the table of these: an implementation is tested and timed by standing in it.
``choice`` chooses among them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import capability, torch_ops

HALF_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
CEILING = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# What an implementation has run on -> what is said of it where it stands.
PROVEN: dict[str | None, str] = {
    "cpu": "",
    "emulator": "run on the emulator alone, on no GPU",
    "interpreter": "run in Triton's interpreter alone, on no GPU",
    None: "not run",
}
IMPL_NAMES = ("reference", "cpu", "triton", "cuda", "cuda_step")

AutocastRule = Callable[[Mapping[str, Any], torch.dtype], dict[str, Any]]  # (arguments, autocast's dtype) -> arguments


@dataclass(frozen=True)
class Case:
    """One set of arguments an op is tested with.

    ``make(device, dtype, seed)`` returns the keyword arguments of the public function; ``grads`` names the
    arguments whose gradients are compared (a name whose value is a sequence of tensors stands for all of them).
    ``dtypes`` are those the case is meant for; gradients are compared in ``grad_dtypes``, fewer where the definition
    has kinks (a maximum, a clip) that half-precision rounding crosses.
    ``tolerance``, relative to the largest magnitude, stands in for the parity rule where the definition itself rounds
    between products: a value near the middle of two steps goes either way, in one run of the reference as in another.
    """

    id: str
    make: Callable[[str, torch.dtype, int], dict[str, Any]]
    grads: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = HALF_AND_FLOAT
    grad_dtypes: tuple[torch.dtype, ...] = HALF_AND_FLOAT
    tolerance: float | None = None


@dataclass(frozen=True)
class Impl:
    """One implementation of an op: the module of its name in the op's package.

    The module holds a function of the op's name, which takes the checked keyword arguments of the public function and
    is differentiable wherever ``supports`` lets a call that needs a gradient through; ``supports(args)``, which
    returns None or the sentence why not, looking at shapes, dtypes, devices and flags only; and ``raw_calls(args)``,
    which lists ``(operator, arguments)`` of the registered operators behind a call, for torch.library.opcheck. It may
    hold ``remark(args)``: what a call that it takes costs more than a like one, as a sentence, or None.
    ``device`` is the device type it runs on; ``proven`` says on what it has run: a key of ``PROVEN``, or a GPU and the
    date.
    """

    name: str
    device: str
    note: str
    proven: str | None

    def __str__(self) -> str:
        return self.name if self.device in (self.proven, "any") else f"{self.name} ({self.proven})"


@capability.constant  # torch.compile would refuse to trace the import
def _load(path: str) -> bool:
    """Import a module."""
    if path not in sys.modules:
        importlib.import_module(path)
    return True


@dataclass(frozen=True)
class OpSpec:
    """One op: see ``calls.op``. ``package`` is the op's package; its ``cases`` module holds ``CASES``."""

    name: str
    package: str
    declaration: Callable[..., Any]
    reference: Callable[..., Any]
    check: Callable[[Mapping[str, Any]], None]
    check_values: Callable[[Mapping[str, Any]], None] | None
    autocast: str | AutocastRule
    impls: tuple[Impl, ...]
    ceiling: Mapping[torch.dtype, float]

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What implementations are given for these arguments of the public function."""
        return self.declaration(*args, **kwargs)[1]

    @property
    def all_impls(self) -> tuple[Impl, ...]:
        return (*self.impls, REFERENCE)

    def impl(self, name: str) -> Impl:
        for candidate in self.all_impls:
            if candidate.name == name:
                return candidate
        known = ", ".join(candidate.name for candidate in self.all_impls)
        raise ValueError(f"ctxfast.{self.name}: impl is {name!r}; expected one of {known}.")

    def module(self, name: str) -> ModuleType:
        """The module ``name`` of the op's package."""
        _load(f"{self.package}.{name}")
        return getattr(sys.modules[self.package], name)

    def supports(self, implementation: Impl, args: Mapping[str, Any]) -> str | None:
        """None, or the sentence why this implementation cannot run these arguments."""
        if implementation.name == "reference":
            return None
        objection = torch_ops.why_definition(tensors(args))
        if objection is not None:
            return objection
        if implementation.name == "triton":
            objection = capability.why_no_triton(next(tensors(args)).device)
            if objection is not None:
                return objection
        return self.module(implementation.name).supports(args)

    def note(self, implementation: Impl, args: Mapping[str, Any]) -> str:
        """What ``explain`` says of an implementation that can run these arguments."""
        if implementation.name == "reference":
            return implementation.note
        remark = getattr(self.module(implementation.name), "remark", lambda args: None)(args)
        proven = PROVEN.get(implementation.proven, f"run on {implementation.proven}")
        return "; ".join(filter(None, (implementation.note, proven, remark)))

    def function(self, implementation: Impl) -> Callable[..., Any]:
        """The function that runs this implementation."""
        if implementation.name == "reference":
            return self.reference
        return getattr(self.module(implementation.name), self.name)

    def check_all(self, args: Mapping[str, Any]) -> None:
        """Raise for arguments that no implementation can take."""
        self.check(args)
        if self.check_values is not None:
            self.check_values(args)

    def cases(self) -> tuple[Case, ...]:
        return self.module("cases").CASES


REFERENCE = Impl("reference", "any", note="plain PyTorch, the definition", proven="cpu")

OPS: dict[str, OpSpec] = {}


def load_implementations() -> None:
    """Import every implementation but Triton's (a kernel language is imported on first use only)."""
    for spec in OPS.values():
        for implementation in spec.impls:
            if implementation.name != "triton":
                spec.module(implementation.name)


def tensors(args: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor among the arguments, those inside lists and tuples too."""
    for value in args.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, Tensor):
                    yield item


def needs_grad(*values: Any) -> bool:
    """Whether autograd would record a call of these arguments."""
    if not torch.is_grad_enabled():
        return False
    for value in values:
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, Tensor) and each.requires_grad:
                return True
    return False
