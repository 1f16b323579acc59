# SPDX-License-Identifier: Apache-2.0
"""The choice of an implementation, first match wins:

1. the argument ``impl=`` of the call,
2. ``with use_impl(...)`` of the running context: a thread's, an asyncio task's,
3. the environment variable ``CTXFAST_IMPL`` (read once, at import),
4. the first implementation in the table whose ``supports`` has no objection; the reference has none, ever.

An implementation asked for by name never falls back to another: its objection becomes the error.
All but the reference object where only torch's own operations will do: see ``torch_ops.why_definition``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from . import capability, torch_ops
from .registry import IMPL_NAMES, OPS, REFERENCE, Impl, OpSpec, tensors

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


def requested() -> tuple[tuple[str, str], ...]:
    """What ``use_impl`` and the environment ask for here and now, as a value to compare."""
    found = _requested()
    return tuple(sorted(found.items())) if found else ()


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
