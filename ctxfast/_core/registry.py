# SPDX-License-Identifier: Apache-2.0
"""The op table and the choice of an implementation.

Every op is declared once, by its public function under ``@op``: its reference (plain PyTorch, the definition), its
other implementations in order of preference, its argument check, its autocast rule. Parity tests, benchmarks,
``explain`` and ``ctxfast info`` walk the table of these: an implementation is tested and timed by standing in it.

Choice of an implementation, first match wins:
1. the argument ``impl=`` of the call,
2. ``with use_impl(...)`` of the running context: a thread's, an asyncio task's,
3. the environment variable ``CTXFAST_IMPL`` (read once, at import),
4. the first implementation in the table whose ``supports`` has no objection; the reference has none, ever.
An implementation asked for by name never falls back to another: its objection becomes the error.
All but the reference object where only torch's own operations will do: see ``torch_ops.why_definition``.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import capability, fast_call, torch_ops

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

P = ParamSpec("P")  # a line each: type checkers know them by nothing else
R = TypeVar("R")


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


def no_values(args: Mapping[str, Any]) -> None:
    """``check_values`` of an op whose arguments may hold anything."""


@dataclass(frozen=True)
class OpSpec:
    """One op: see ``op``. ``package`` is the op's package; its ``cases`` module holds ``CASES``."""

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

# What is asked for: op name (or "*") -> implementation name. By CTXFAST_IMPL, in the whole process; and by use_impl,
# all it adds up to, in the context that asked. Neither dict changes once it is there.
_environment: dict[str, str] = {}
_chosen: ContextVar[dict[str, str]] = ContextVar("ctxfast.use_impl")


class _Context:
    """The running context's choice as an attribute: torch.compile cannot trace ``ContextVar.get``, but reads a property
    whose getter is a C function like an attribute, and guards on what it finds, at each call anew."""

    requested = property(_chosen.get)  # this object itself where use_impl is not active: the getter's default


class _Traced(threading.local):
    """What use_impl asks for inside of what torch.compile traces, which cannot trace ``ContextVar.set`` either."""

    def __init__(self) -> None:
        self.requested: dict[str, str] | None = None


_context, _traced = _Context(), _Traced()


def _requested() -> dict[str, str]:
    """What is asked for here and now."""
    found = _traced.requested
    if found is None:
        found = _context.requested
    return _environment if found is _context else found


def why_no_impl(name: str | None, device: torch.device, ops: Iterable[str] | None = None) -> str | None:
    """None if an implementation of that name of one of these ops may run on a device, else one sentence: asking for it
    would change nothing there. Ops of another name run as if nothing were asked.

    Args:
        name: of an implementation; None for no choice.
        ops: what a model runs; None for all there are.
    """
    specs = list(OPS.values()) if ops is None else [OPS[op] for op in ops]
    found = {candidate.name for spec in specs for candidate in spec.all_impls if _is_of(candidate, device)}
    if name is None or name in found:
        return None
    known = ", ".join(each for each in IMPL_NAMES if each in found)
    which = "no op" if ops is None else f"none of the ops of this model ({', '.join(spec.name for spec in specs)})"
    return f"{which} has an implementation {name!r} for {device.type}; expected {known}, or None to choose."


def _is_of(candidate: Impl, device: torch.device) -> bool:
    if candidate.name == "triton" and device.type == "cpu":
        return capability.is_triton_interpreted()
    return candidate.device in ("any", device.type)


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


def requested() -> tuple[tuple[str, str], ...]:
    """What ``use_impl`` and the environment ask for here and now, as a value to compare."""
    found = _requested()
    return tuple(sorted(found.items())) if found else ()


def _requested_for(spec: OpSpec) -> str | None:
    found = _requested()
    name = found.get(spec.name)
    if name is not None:
        return name
    name = found.get("*")
    # A name given for all ops binds those that have such an implementation; the rest choose for themselves.
    if name is not None and any(candidate.name == name for candidate in spec.all_impls):
        return name
    return None


def resolve(spec: OpSpec, args: Mapping[str, Any], impl: str | None = None) -> Impl:
    """The implementation that runs this call; raises if the one asked for by name cannot."""
    name = impl if impl is not None else _requested_for(spec)
    if name is not None:
        chosen = spec.impl(name)
        objection = spec.supports(chosen, args)
        if objection is not None:
            way = "Pass impl='reference', or leave impl out."
            if impl is None:
                way = f"Choose for this op alone, as in use_impl({name!r}, {spec.name}='reference')."
            raise RuntimeError(
                f"ctxfast.{spec.name}: impl={name!r} was asked for and cannot run this call: {objection} {way}"
            )
        return chosen
    device = next(tensors(args)).device.type
    candidates = [candidate for candidate in spec.impls if candidate.device == device]
    for candidate in candidates:
        if spec.supports(candidate, args) is None:
            return candidate
    if candidates and torch_ops.exports_gradient(tensors(args)):
        torch_ops.warn_of_export()
    return REFERENCE


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value


def _autocast(spec: OpSpec, args: dict[str, Any]) -> dict[str, Any]:
    if spec.autocast == "keep":
        return args
    device = next(tensors(args)).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # meta has none
        return args
    dtype, rule = torch.get_autocast_dtype(device), spec.autocast
    return rule(args, dtype) if callable(rule) else {name: _cast(value, dtype) for name, value in args.items()}


def _checked(spec: OpSpec, args: dict[str, Any], impl: str | None) -> Callable[..., Any]:
    """The function that runs a call, after all checks."""
    spec.check_all(args)
    return spec.function(resolve(spec, args, impl))


def prepared(spec: OpSpec, args: dict[str, Any], impl: str | None = None) -> tuple[Callable[..., Any], dict[str, Any]]:
    """All of a call but the call: the function that runs it, and its arguments, checked, as autocast wants them."""
    facts = () if spec.check_values is None else fast_call.facts(spec.name, impl, requested, args)
    function = fast_call.FOUND.get(facts) if facts else None
    if function is not None:
        spec.check_values(args)
        return function, args
    args = _autocast(spec, args)
    if torch_ops.is_jit_tracing():
        with torch_ops.without_tracer_warnings():
            function = _checked(spec, args, impl)
    else:
        function = _checked(spec, args, impl)
    if facts:
        fast_call.remember(facts, function)
    return function, args


def given(impl: str | None, /, **args: Any) -> Any:
    """What a function under ``@op`` returns: the implementation asked for, and the arguments of implementations.

    Typed as anything, for what the function is annotated with is its result.
    """
    return impl, args


def op(
    *,
    reference: Callable[..., Any],
    check: Callable[[Mapping[str, Any]], None],
    check_values: Callable[[Mapping[str, Any]], None] | None = None,
    autocast: str | AutocastRule = "keep",
    impls: tuple[Impl, ...] = (),
    ceiling: Mapping[torch.dtype, float] = CEILING,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares an op by its public function, which returns ``given(impl, name=argument, ...)``.

    The function's name is the op's and its package's. What users call applies the autocast rule to these arguments,
    checks them, chooses an implementation and runs it.

    Args:
        reference: the definition.
        check: raises for kinds, dtypes, shapes and devices that no implementation can take.
        check_values: the same for values (of ids, of offsets); where it is given, a call like one before it skips
            ``check``.
        autocast: "lower" (floating arguments go to the autocast dtype), "keep", or a rule of the op's own.
        impls: the implementations, fastest first; the reference is the last, and implied.
        ceiling: dtype -> largest error allowed at all, relative to the largest magnitude of the float64 result,
            so that a bad reference cannot excuse a bad kernel.
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        package = function.__module__
        spec = OpSpec(name, package, function, reference, check, check_values, autocast, impls, ceiling)
        for implementation in impls:
            if implementation.name not in IMPL_NAMES:
                raise ValueError(f"ctxfast.{name}: implementation {implementation.name!r} is not one of {IMPL_NAMES}.")
        if name in OPS:
            raise ValueError(f"ctxfast: op {name!r} is registered twice.")
        if isinstance(autocast, str) and autocast not in ("lower", "keep"):
            raise ValueError(f"ctxfast.{name}: autocast is {autocast!r}; expected 'lower', 'keep' or a function.")
        OPS[name] = spec

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            impl, gathered = function(*args, **kwargs)
            implementation, gathered = prepared(spec, gathered, impl)
            return implementation(**gathered)

        # A code object of its own: torch.compile counts compilations by it, and all ops would share one limit.
        run.__code__ = run.__code__.replace(co_name=name)
        return run

    return declare


def _request(ops: dict[str, str]) -> dict[str, str]:
    for op, name in ops.items():
        if op != "*" and op not in OPS:
            raise ValueError(f"ctxfast.use_impl: there is no op {op!r}; expected one of {', '.join(sorted(OPS))}.")
        if op != "*":
            OPS[op].impl(name)
        elif name not in IMPL_NAMES:
            raise ValueError(f"ctxfast.use_impl: impl is {name!r}; expected one of {', '.join(IMPL_NAMES)}.")
    return ops


@contextmanager
def use_impl(impl: str | None = None, **per_op: str) -> Iterator[None]:
    """Ask for implementations by name inside a ``with`` block.

    Args:
        impl: name for every op that has such an implementation, e.g. ``"reference"``.
        per_op: name for one op, e.g. ``attention="reference"``; goes before ``impl``.

    It holds for the thread that runs the block, and there for the asyncio task, as context variables do. Other threads
    have the environment's choice until they make their own, or run in a copy of this context (``asyncio.to_thread``,
    ``contextvars.copy_context().run``). What a forward pass chose, its backward pass keeps. Blocks inside each other
    add up, and ``impl=`` of a call goes before them. A generator that yields inside the block leaves the choice to
    whoever asked for the next item.

    Raises:
        ValueError: unknown op or implementation.
        RuntimeError: from the call, when the implementation asked for cannot run it.
    """
    wanted = {**_requested(), **_request({**({"*": impl} if impl is not None else {}), **per_op})}
    if torch.compiler.is_compiling():
        before, _traced.requested = _traced.requested, wanted
        try:
            yield
        finally:
            _traced.requested = before
        return
    token = _chosen.set(wanted)
    try:
        yield
    finally:
        _chosen.reset(token)


def with_choice(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what is asked for here and now, wherever it is called.

    For what a backward pass runs once more (checkpoints): after the block of ``use_impl``, on a GPU in another thread.
    """
    if torch.compiler.is_compiling():  # a graph holds what was chosen
        return function
    requested = _requested()

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _chosen.set(requested)
        try:
            return function(*args, **kwargs)
        finally:
            _chosen.reset(token)

    return run


def read_environment() -> None:
    """Take ``CTXFAST_IMPL``, once all ops are in: one name for all of them, or ``op=name`` pairs with commas."""
    text = os.environ.get("CTXFAST_IMPL", "").strip()
    if not text:
        return
    wanted: dict[str, str] = {}
    for part in text.split(","):
        op, _, name = part.strip().rpartition("=")
        wanted[op or "*"] = name
    try:
        _environment.update(_request(wanted))
    except ValueError as error:
        raise ValueError(f"CTXFAST_IMPL={text!r} cannot be read. {error}") from None


@dataclass(frozen=True)
class Explanation:
    """Why each implementation of an op runs, or does not run, a given call."""

    op: str
    rows: tuple[tuple[str, str, str], ...]  # implementation, "used" | "could" | "no", reason

    @property
    def used(self) -> str:
        return next(name for name, verdict, _ in self.rows if verdict == "used")

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows)
        lines = [f"{name:<{width}}  {verdict:<5}  {reason}" for name, verdict, reason in self.rows]
        return "\n".join([f"ctxfast.{self.op}:", *("  " + line.rstrip() for line in lines)])

    __repr__ = __str__


def explain(spec: OpSpec, *args: Any, **kwargs: Any) -> Explanation:
    """What ``ctxfast.explain`` says of a call of the public function."""
    impl, args = spec.declaration(*args, **kwargs)
    args = _autocast(spec, args)
    spec.check_all(args)
    chosen = resolve(spec, args, impl).name
    rows = []
    for candidate in spec.all_impls:
        objection = spec.supports(candidate, args)
        verdict = "used" if candidate.name == chosen else "could" if objection is None else "no"
        rows.append((candidate.name, verdict, objection or spec.note(candidate, args)))
    return Explanation(spec.name, tuple(rows))
