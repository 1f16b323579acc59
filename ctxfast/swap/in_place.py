# SPDX-License-Identifier: Apache-2.0
"""Other people's models made faster in place: ``swap_in`` walks a model's modules, ``restore`` undoes it.

A module is swapped by giving it another class, one that keeps its attributes and changes how it is computed. So the
module stays the very same object: its parameters, buffers, hooks, device, dtype, mode, ties and names in state_dict
are what they were, and restoring gives it back its class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .._core import choice, registry
from . import allennlp, padding_readers, rows, torch_encoder, transformers, unknown_encoders
from .table import TABLE
from .torch_modules import LSTM, LayerNorm

# In the __dict__ of a swapped module: its own class.
_ORIGINAL = "_ctxfast_original"


@dataclass(frozen=True)
class SwapReport:
    """What ``swap_in`` did.

    Attributes:
        swapped: (path, class before, class now) of every module that is swapped, those of earlier calls too.
        near_misses: (path, sentence) of modules left alone though their kind is in the table, and of swapped modules
            whose calls sometimes run as before.
        notes: (path, sentence) of what is otherwise now than it was.
    """

    swapped: tuple[tuple[str, str, str], ...]
    near_misses: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}:" if self.swapped else _NOTHING]
        lines += [f"  {path}: {before} -> {now}" for path, before, now in self.swapped]
        for title, entries in (("near misses", self.near_misses), ("notes", self.notes)):
            together: dict[str, list[str]] = {}
            for path, sentence in entries:
                together.setdefault(sentence, []).append(path)
            if together:
                lines.append(f"{title}:")
            for sentence, paths in together.items():
                more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
                lines.append(f"  {paths[0]}{more}: {sentence}")
        return "\n".join(lines)

    __repr__ = __str__


_NOTHING = (
    "nothing to swap: no module is a torch.nn.LSTM or TransformerEncoder, an encoder of Transformers or a part of "
    "AllenNLP's ELMo that ctxfast knows and can run faster."
)


def _narrow(weight_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that was asked for, by itself or by name."""
    known = {"bfloat16": torch.bfloat16, "int8": torch.int8}
    found = known.get(weight_dtype, weight_dtype) if isinstance(weight_dtype, str) else weight_dtype
    if found not in (None, *known.values()):
        raise ValueError(
            f"ctxfast.swap_in: weight_dtype is {weight_dtype!r:.80}; expected None, torch.bfloat16 or torch.int8."
        )
    return found


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _short_names() -> dict[str, list[str]]:
    """Names of classes, and the full names that they stand for."""
    found: dict[str, list[str]] = {}
    for name in TABLE:
        found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def _wanted(only: Iterable[str | type] | str | type | None) -> frozenset[str]:
    """Full names of the classes to swap."""
    if only is None:
        return frozenset(name for name, entry in TABLE.items() if not entry.on_request)
    if not isinstance(only, (str, type, Iterable)):
        raise TypeError(f"ctxfast.swap_in: only is {only!r:.80}; expected names of classes, classes, or None.")
    asked = [only] if isinstance(only, (str, type)) else list(only)
    short, found = _short_names(), set()
    for item in asked:
        name = item.__name__ if isinstance(item, type) else item
        if not isinstance(name, str) or name not in short:
            raise ValueError(
                f"ctxfast.swap_in: only holds {name!r}; expected names of classes among {', '.join(sorted(short))}."
            )
        full = _full_name(item) if isinstance(item, type) else ""
        found.update([full] if full in short[name] else short[name])
    return frozenset(found)


def _opaque(module: nn.Module) -> str | None:
    """Why nothing in this module and below can be swapped; None if it can be looked into."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, whose code is fixed: swap in the module that it was made from."
    kind = type(module)
    if _full_name(kind) == "torch._dynamo.eval_frame.OptimizedModule" or module._compiled_call_impl is not None:
        return "it is compiled already, and compiled code would not follow: swap in the module, then compile it."
    if ".quantized" in kind.__module__ and kind.__name__ in _short_names():
        return "it is quantised, and its weights are packed for other kernels."
    return None


def _objection(module: nn.Module, name: str, impl: str | None) -> str | None:
    """Why a module of a class in the table, or of a class made from one, stays as it is."""
    kind = type(module)
    base = kind if name in allennlp.KINDS else next(each for each in kind.__mro__ if _full_name(each) == name)
    if base is not kind:
        if kind.forward is not base.forward:
            return f"{kind.__name__} is a subclass of {base.__name__} with a forward of its own."
        return f"{kind.__name__} is a subclass of {base.__name__}, which would lose its type."
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, as wrappers do that move weights about."
    try:
        return TABLE[name].objection(module, impl) or _no_impl(module, name, impl)
    except Exception as error:  # whatever somebody's parts raise when they are looked at, the model stays usable
        return f"it is not built as {name.rpartition('.')[2]} is ({type(error).__name__}: {error})."


def _no_impl(module: nn.Module, name: str, impl: str | None) -> str | None:
    device = next((each.device for each in module.parameters()), torch.device("cpu"))  # a LayerNorm may have none
    reason = choice.why_no_impl(impl, device, TABLE[name].ops)
    return None if reason is None else f"impl={impl!r} was asked for, but {reason}"


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module), every module once; what is below an opaque one is left out."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield path, module
        if _opaque(module) is None:
            for name, child in module.named_children():
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def _above(model: nn.Module, module: nn.Module) -> tuple[nn.Module, ...]:
    """Every module of a model that a module stands in, by whatever path."""
    return tuple(each for each in model.modules() if each is not module and module in each.modules())


def swap_in(
    model: nn.Module,
    impl: str | None = None,
    strict: bool = False,
    only: Iterable[str | type] | str | type | None = None,
    *,
    padding: str | None = None,
    weight_dtype: torch.dtype | str | None = None,
    unknown: str | None = None,
) -> SwapReport:
    """Make a model faster in place: its ``torch.nn.LSTM`` and ``TransformerEncoder``, encoders of Hugging Face's BERT
    family, AllenNLP's ELMo.

    Parameters stay the very same objects under the same names, state_dict, hooks, device, dtype, mode and tied
    weights included; training, autocast, gradient checkpointing, copies and pickles go on. ``restore`` undoes it.
    Swap in before compiling.

    Only what is Hugging Face's own is swapped: classes and functions of every part are compared, and an encoder is run
    both ways once on a small input. What was changed is a near miss with its reason; what changes later is noticed at
    the next call, which then runs as before. In training, dropout draws other numbers than the original does.

    An encoder drops padding on its way in and puts zeros back in its place. Under heads of Transformers and modules of
    sentence-transformers that read a text's own tokens alone this changes nothing; calls that read more (question
    answering, labels at padding, masked query expansion, hidden states that are asked for) run as before, and so does
    every batch with padding under a class, or with a head or pooler, that is not known. Other calls that run as before:
    attention weights are asked for, padding comes first in a row, masks differ by query, caches, tracing, torch.func;
    on a CPU and without ``impl``, batches with less than a tenth of padding, which gain nothing; encoders with layers
    that have hooks or hold other modules than they had.

    Packed copies of weights follow every change PyTorch counts, and by any road (``.data``, NumPy, another process) a
    change of every entry of a row, of a column or of all of a weight; after writing to parts of a large weight such a
    way, call ``ctxfast.forget_packed(model)``. Inference on a GPU goes through CUDA graphs;
    ``model.encoder.cuda_graphs = False`` switches them off.

    Args:
        model: any module; also one that is swapped itself.
        impl: implementation of the ops inside, where they have it; None chooses per call.
        strict: raise if nothing can be swapped.
        only: names of classes, or classes, to swap and no others: "LSTM", "BertEncoder", ... "LayerNorm" is swapped
            only where named.
        padding: what encoders give at padding: "zero", or "keep" for Hugging Face's own values at every row (batches
            with padding run as before). None decides for each encoder by what stands around it, as above. A second
            call decides anew.
        weight_dtype: how both factors of products are held, as in ``ctxfast.linear_act`` and ``ctxfast.lstm``; a dtype
            or its name. torch.int8 for encoders, LSTMs and AllenNLP's, torch.bfloat16 for the latter two (an encoder
            computes in bfloat16 where the model is converted to it), both on a CPU. Parameters stay as they are: packed
            copies are made of them. What cannot compute so is a near miss and not swapped; calls that run as before
            have the model's own precision. None: as the model is. A second call decides anew.
        unknown: "rows" for encoders of Transformers that are not known: their attention stays their own, and parts that
            work row by row, as a trial run of their model on a small batch finds out, run over real tokens alone.

    Returns:
        What was swapped and what nearly was, with reasons; print it.

    Raises:
        TypeError: not a module; ``only`` is neither names nor classes.
        ValueError: unknown names; nothing to swap, if ``strict``; nothing that can compute in ``weight_dtype``. The
            model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"ctxfast.swap_in: model is a {type(model).__name__}; expected a torch.nn.Module.")
    if impl is not None and impl not in registry.IMPL_NAMES:
        raise ValueError(
            f"ctxfast.swap_in: impl is {impl!r}; expected None or one of {', '.join(registry.IMPL_NAMES)}."
        )
    if padding not in (None, *padding_readers.PADDINGS):
        raise ValueError(f"ctxfast.swap_in: padding is {padding!r}; expected None, 'zero' or 'keep'.")
    if unknown not in (None, "rows"):
        raise ValueError(f"ctxfast.swap_in: unknown is {unknown!r}; expected None or 'rows'.")
    narrow = _narrow(weight_dtype)
    wanted = _wanted(only)
    plan: list[tuple[nn.Module, type[nn.Module]]] = []
    readers: list[tuple[nn.Module, padding_readers.Reader]] = []
    swapped: list[tuple[str, str, str]] = []
    misses: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    dtypes: list[tuple[nn.Module, torch.dtype | None]] = []
    inside: set[nn.Module] = set()  # of encoders: what stands there is said of the encoder
    ours: set[nn.Module] = set()  # layers that a swapped encoder of torch's runs

    def hold(module: nn.Module, name: str) -> torch.dtype | None | str:
        """What a module's products are held in from now on; a sentence where it cannot be what was asked for."""
        function = None if name not in TABLE else TABLE[name].narrow
        if narrow is None or function is None:
            return None
        return function(module, impl, narrow) or narrow

    def read(path: str, module: nn.Module, is_rows: bool = False) -> None:
        is_torchs = isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        known = transformers.ENCODERS.get(_full_name(module.__dict__.get(_ORIGINAL, type(module))))
        if known is not None and known.note is not None:
            notes.append((path, known.note))
        above = _above(model, module)
        if is_rows:  # the model that it was tried in is known to read no padding
            above = _above(model, rows.model_of(module, above) or module)
        reader = padding_readers.Reader(above, padding)
        readers.append((module, reader))
        if is_torchs and reader.is_near_miss:
            reader.note = torch_encoder.MAY_READ
        if reader.note is not None:
            (misses if reader.is_near_miss else notes).append((path, reader.note))
        notes.extend((path, sentence) for sentence in reader.sometimes)

    for path, module in _walk(model):
        path, kind = path or "(the model)", type(module)
        layers = [] if module in inside else unknown_encoders.layers_of(module)
        inside.update(part for layer in layers for part in layer.modules())
        reason = _opaque(module)
        if reason is not None:
            if not any(outer == "(the model)" or path.startswith(f"{outer}.") for outer, *_ in swapped):
                misses.append((path, reason))
            continue
        before = module.__dict__.get(_ORIGINAL)
        if isinstance(module, rows.RowWise):
            continue  # said of its encoder
        if before is not None:
            held = hold(module, next((each for each in (_full_name(before), before.__name__) if each in TABLE), ""))
            if isinstance(held, str):
                misses.append((path, held))
                held = None
            dtypes.append((module, held))
            swapped.append((path, before.__name__, _shown(kind, held)))
            is_rows = isinstance(module, rows.RowsEncoder)
            if is_rows or isinstance(module, transformers.PackedEncoder) or _full_name(before) in torch_encoder.SWAPPED:
                read(path, module, is_rows)
                ours.update(torch_encoder.layers_in(module))
            continue
        name = next((_full_name(each) for each in kind.__mro__ if _full_name(each) in wanted), None)
        if name is None and allennlp.is_known(kind) and kind.__name__ in wanted:
            name = kind.__name__
        if module in ours:
            continue
        if name is None:
            if only is not None or not layers:
                continue
            parts = rows.parts_of(module, layers, _above(model, module)) if unknown == "rows" else ""
            if isinstance(parts, str):
                misses.append((path, parts or unknown_encoders.reason(module, layers)))
                continue
            plan += [(module, rows.made_class(rows.RowsEncoder, kind))]
            plan += [(part, rows.made_class(rows.RowWise, type(part))) for part in parts]
            swapped.append((path, kind.__name__, _shown(plan[-len(parts) - 1][1], None)))
            read(path, module, True)
            continue
        reason, held = _objection(module, name, impl), None
        if reason is None:
            found = hold(module, name)
            reason, held = (found, None) if isinstance(found, str) else (None, found)
        if reason is not None:
            misses.append((path, reason))
            continue
        replacement = TABLE[name].replacement(kind)
        plan.append((module, replacement))
        dtypes.append((module, held))
        swapped.append((path, kind.__name__, _shown(replacement, held)))
        if name in transformers.ENCODERS or name in torch_encoder.SWAPPED:
            read(path, module)
            ours.update(torch_encoder.layers_in(module))
    if strict and not swapped:
        raise ValueError(f"ctxfast.swap_in: {SwapReport((), tuple(misses))}")
    if narrow is not None and not any(held for _, held in dtypes):
        raise ValueError(
            f"ctxfast.swap_in: weight_dtype is {narrow}; expected a model with a part that can compute so. "
            f"{SwapReport((), tuple(misses))}"
        )
    for module, replacement in plan:
        module.__dict__[_ORIGINAL] = type(module)
        module.__class__ = replacement
        if impl is not None:
            module.__dict__["impl"] = impl
    for module, held in dtypes:
        if held is None:
            module.__dict__.pop("weight_dtype", None)
        else:
            module.__dict__["weight_dtype"] = held
    for module, reader in readers:
        module.__dict__["padding"] = reader.padding
        for each in reader.watched:
            padding_readers.watch(each)
    return SwapReport(tuple(swapped), tuple(misses), tuple(notes))


def _shown(kind: type, weight_dtype: torch.dtype | None) -> str:
    products = "" if weight_dtype is None else f", {str(weight_dtype).removeprefix('torch.')} products"
    if issubclass(kind, rows.RowsEncoder):
        return f"{kind.__name__}, packed but for its attention"
    if kind in (LSTM, LayerNorm):
        return f"ctxfast.nn.{kind.__name__}{products}"
    return f"{kind.__name__}, {'fused' if kind.__name__ in allennlp.KINDS else 'packed'}{products}"


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo ``swap_in``: every swapped module gets its class back; objects and values are what they were.

    Returns:
        The paths restored.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"ctxfast.restore: model is a {type(model).__name__}; expected a torch.nn.Module.")
    paths = []
    for path, module in model.named_modules():
        padding_readers.unwatch(module)
        original = module.__dict__.get(_ORIGINAL)
        if original is None:
            continue
        for name in (*transformers.OWN_NAMES, *allennlp.OWN_NAMES):
            module.__dict__.pop(name, None)
        module.__class__ = original
        if isinstance(module, nn.LSTM):
            module._init_flat_weights()  # cuDNN wants weights side by side, which a move to a device undid meanwhile
        paths.append(path or "(the model)")
    return tuple(paths)
