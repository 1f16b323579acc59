# SPDX-License-Identifier: Apache-2.0
"""Encoders of Hugging Face's Transformers (version 5) over packed tokens, for ``ctxfast.swap_in``.

The layers stay Hugging Face's modules and hold the parameters; only the encoder's ``forward`` is another one, which
drops padding, reads the layers' parameters, and puts padding back. What it cannot do it leaves to the original.
Transformers is imported with the first encoder that is swapped.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._core import capability, choice, transfer
from ..nn import encoder, relative
from ..nn.graphs import PackedGraphs
from ..nn.watched import is_watched
from ..ops.shared.weight_cache import forget_packed
from ..packing import Packing
from . import attention_interface, flattened, identity, padding_readers, transformers_layers, transformers_models
from .masks import kept_keys
from .transformers_kinds import ENCODERS
from .transformers_layers import Layer, Layers, Rotary
from .transformers_parts import Kind, Parts, Stack

# Major version of Transformers that tests run with.
_TESTED = 5
_is_warned = False


def _version() -> str:
    return import_module("transformers").__version__


def _warn_of(version: str) -> None:
    global _is_warned
    if not _is_warned:
        _is_warned = True
        text = f"Transformers is {version}; ctxfast.swap_in is tested with {_TESTED}. Compare results before use."
        warnings.warn(text, stacklevel=4)


def objection(encoder: nn.Module) -> str | None:
    """Why an encoder of a known class stays as it is; None if it can be swapped."""
    version = _version()
    major = int(version.partition(".")[0])
    if major < _TESTED:
        return f"Transformers is {version}; version {_TESTED} is needed."
    if major > _TESTED:
        _warn_of(version)
    kind = _kind(type(encoder))
    reason = identity.why_not_stock(type(encoder), "transformers", ("forward", "__call__") if kind.is_model else None)
    if reason is not None:
        return reason
    stack = kind.stack(encoder)
    if isinstance(stack, str):
        return stack
    if not stack.layers:
        return "it has no layers."
    around = transformers_layers.odd_around(stack, kind)
    if around is not None:
        return around
    for layer in dict.fromkeys(stack.layers):
        found = transformers_layers.examine(layer, kind)
        if isinstance(found, str):
            return found
    return None


def _kind(encoder: type) -> Kind:
    return ENCODERS[f"{encoder.__module__}.{encoder.__qualname__}"]


def kind_of(encoder: nn.Module) -> Kind:
    """The kind of an encoder, swapped or not."""
    return _kind(encoder.__dict__.get("_ctxfast_original", type(encoder)))


def parts_of(encoder: nn.Module) -> Parts:
    """The parts of the first layer of an encoder that nothing speaks against, swapped or not."""
    kind = kind_of(encoder)
    stack = kind.stack(encoder)
    assert not isinstance(stack, str)
    return kind.parts(stack.layers[0])


def windows_of(encoder: nn.Module) -> set[int]:
    """The windows of its layers' attention."""
    kind = kind_of(encoder)
    stack = kind.stack(encoder)
    assert not isinstance(stack, str)
    found = {kind.parts(layer).window for layer in stack.layers}
    return {window for window in found if window is not None}


# How far results on a small input may lie apart, relative to the largest, where only the order of sums differs.
_BOUNDS = {torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


def difference(encoder: nn.Module, impl: str | None) -> str | None:
    """Runs an encoder both ways on a small ragged input: None if the results are the same, else a sentence.

    Classes and functions may all be Hugging Face's own and the result still be another: this sees it whatever the
    cause. On a CPU the layers run as in later calls without gradients, else by definitions. Not where hooks are in the
    way, which would see the input.
    """
    kind = _kind(type(encoder))
    stack = kind.stack(encoder)
    layers = [None] if isinstance(stack, str) else Layers().examined(stack, kind)
    if isinstance(stack, str) or layers[0] is None or None in layers or torch.nn.modules.module._has_any_global_hook():
        return None
    if kind.is_model and any(is_watched(part) for part in encoder.modules() if part is not encoder):
        return None
    parts = layers[0].parts
    weight, function = parts.qkv[0].weight, transformers_layers.attention_function(parts.attention, kind)
    width = weight.shape[1] if stack.entry is None else stack.entry.weight.shape[1]
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=weight.device)
    mask: Tensor | None = torch.zeros(2, 1, 1, 5, dtype=weight.dtype, device=weight.device)
    mask = mask.masked_fill(~real[:, None, None], torch.finfo(weight.dtype).min)
    if function.__name__ == "flash_attention_forward" or kind.is_model:
        mask = real.long()
    elif function.__name__ == "flex_attention_forward":
        mask, real = None, torch.ones_like(real)
    packed = packed_class(kind.full_name)
    other = packed.__new__(packed)
    other.__dict__.update(encoder.__dict__)
    is_like_later = weight.device.type == "cpu" and mask is not None
    other.__dict__.update(impl=impl if is_like_later else "reference", padding="zero", cuda_graphs=False)
    with identity.undisturbed(encoder):
        x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
        given = dict.fromkeys(kind.arguments) | {kind.arguments[0]: x, "attention_mask": mask}
        given |= {} if kind.returns_dict else {"return_dict": True}
        expected = type(encoder).forward(encoder, **given).last_hidden_state[real].double()
        found = packed.forward(other, **given).last_hidden_state[real].double()
    forget_packed(encoder)  # training needs no packed weights
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if apart <= _BOUNDS.get(weight.dtype, 0.0):
        return None
    return (
        f"on a small input its own result and the packed one are {apart:.2g} of the largest value apart: something in "
        f"it is not Hugging Face's."
    )


def _run(
    layers: Sequence[Layer],
    impl: str | None,
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    all_layers: bool = False,
    recompute: Callable[..., Tensor] | None = None,
    buckets: nn.Module | None = None,
    rotary: Rotary | None = None,
) -> list[Tensor]:
    """``nn.encoder.run`` over layers that were examined."""
    table = None if buckets is None else relative.relative_bias(buckets.weight)
    with nullcontext() if impl is None else choice.use_impl(impl):
        # One at a time: where query, key and value are joined anew, all layers' would be there at once.
        if recompute is not None:
            described: Iterable[Any] = layers if rotary is None else [partial(each, rotary=rotary) for each in layers]
        else:
            described = (layer.weights(rotary) for layer in layers)
        return encoder.run(
            described, x, cu_seqlens, max_seqlen, all_layers=all_layers, recompute=recompute, relative_bias=table
        )


def _recompute(layer: nn.Module) -> Callable[..., Tensor] | None:
    """What calls a layer once more in the backward pass; None where its activations are kept."""
    is_on = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
    return layer._gradient_checkpointing_func if is_on else None


def real_tokens(mask: Any, batch: int, length: int) -> tuple[Tensor, Tensor] | None:
    """(B, L) bool, where tokens are, from a mask as encoders get it; and a bool, whether it is that of a padding mask
    whose texts begin at column 0. None if it cannot be one, or its gradient is wanted.

    Masks: (B, L), nonzero for tokens; or (B, 1, L, L), bool or additive, made from such a one. Reads no value.
    """
    if not isinstance(mask, Tensor) or (mask.requires_grad and torch.is_grad_enabled()):
        return None
    if mask.dim() == 2 and tuple(mask.shape) == (batch, length):
        real = mask != 0
        return real, real[:, 0].all()
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != length:
        return None
    row, is_padding = kept_keys(mask)
    return row.expand(batch, length), row[:, 0].all() & is_padding


def reads_as_padding(mask: Any, x: Tensor, attention: Any) -> bool:
    """Whether an attention function of Transformers takes a mask for what ``real_tokens`` does.

    A mask of two dimensions is padding's for flash attention alone: to others it is (L, L). Scaled dot-product
    attention takes bool for real tokens, eager attention adds it. Of other dtypes than hidden states have the functions
    are left to say what they think.
    """
    name = getattr(attention, "__name__", "")
    if mask is None:
        return attention is not None
    if mask.dim() == 2 or name == "flash_attention_forward":
        return mask.dim() == 2 and name == "flash_attention_forward"
    if mask.dtype == torch.bool:
        return name == "sdpa_attention_forward" or attention is attention_interface.attention
    return mask.dtype == x.dtype or (mask.is_floating_point() and torch.is_autocast_enabled(x.device.type))


class _NotOurs(Exception):
    """A call for the original: its layers are not what was swapped."""


class PackedEncoder(nn.Module):
    """What takes the place of an encoder's class: its ``forward`` without padding. First base of a class made by
    ``packed_class``, whose second base is the original."""

    impl: str | None = None
    padding: str = "zero"  # "keep": batches with padding run as before; see padding_readers for others
    weight_dtype: torch.dtype | None = None  # torch.int8: both factors of products in 8 bits
    cuda_graphs: bool = True  # inference on a GPU goes through CUDA graphs; set it to False to switch them off
    _kind: Kind
    _result: type
    _original: type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        kind = type(self)
        if not issubclass(kind, PackedEncoder):  # restored, and somebody kept this function
            return kind.forward(self, *args, **kwargs)
        # Compiled, it is Hugging Face's code: where tokens are is read from a mask's values, which no graph can do.
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        if kind._kind.is_model:
            given = transformers_models.given(kind._original.forward, self, args, kwargs)
        else:
            given = _given(kind._kind, args, kwargs)
        found = None if given is None else kind._forward_packed(self, kind, *given)
        return kind._original.forward(self, *args, **kwargs) if found is None else found

    # From here on nothing asks the module for its class: another thread may be restoring it.
    def _forward_packed(self, kind: type[PackedEncoder], x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any | None:
        """The result; None if this call is one for the original."""
        own, stack, is_model = self.__dict__, kind._kind.stack(self), kind._kind.is_model
        impl, weight_dtype = own.get("impl"), own.get("weight_dtype")
        texts = None
        if not is_model:
            texts = flattened.offsets(x, kwargs, getattr(own.get("config"), "_attn_implementation", None))
        if texts is not None:
            kwargs = {name: value for name, value in kwargs.items() if name not in flattened.NAMES}
        others = transformers_models.others(kwargs) if is_model else kwargs
        if isinstance(stack, str) or not kind._is_plain_call(x, mask, others):
            return None
        if is_model and transformers_models.is_asked(self, kwargs, "output_attentions"):
            _warn_of_attentions()
            return None
        like = next(self.parameters()).new_empty(*x.shape[:2], 0) if is_model else x
        is_asked = texts is not None or impl is not None or weight_dtype is not None
        packing = _packing(like, mask, is_asked, is_model or stack.buckets is not None)
        if packing is None or (texts is not None and not packing.is_full):
            return None
        if is_model:
            collects = transformers_models.is_asked(self, kwargs, "output_hidden_states")
        else:
            is_older = kind._kind.is_older
            collects = bool(kwargs.get("output_hidden_states")) if is_older else _collected("hidden_states")
        if collects and not kind._kind.collects:
            return None
        if not packing.is_full:
            is_seen = collects or not all(map(transformers_layers.is_capture, own["_forward_hooks"].values()))
            if padding_readers.is_read(own.get("padding", PackedEncoder.padding), is_seen):
                return None
        known = _kept(own, "_ctxfast_layers", Layers)
        seen_mask = None if is_model else mask  # a model makes its layers' masks itself

        def examined() -> list[Layer]:
            every = known.examined(stack, kind._kind)
            # A layer that is somebody's own may read padding as well.
            if None in every or not reads_as_padding(seen_mask, x, known.attention()):
                raise _NotOurs
            for layer in every:
                if layer.drops_inside:
                    raise _NotOurs
                layer.weight_dtype = weight_dtype
            return every

        # A replay comes first, and is looked into while the GPU works on it: nothing but time is lost where it is one
        # that should not have been.
        def is_still() -> bool:
            return known.are_still(stack) and reads_as_padding(seen_mask, x, known.attention())

        try:
            if is_model:
                # Before it embeds anything: a call for the original begins anew.
                every, types = examined(), {layer.parts.rotary for layer in known.examined(stack, kind._kind)}

                def layers(x: Tensor) -> Tensor:
                    rotary = transformers_models.rotary(self, x, [each for each in types if each is not None])
                    return _padded(x, packing, None, stack, every, impl, collects, rotary)[-1]

                return transformers_models.run(self, kind._original, kwargs, layers)
            if not collects and not any(map(_recompute, stack.layers)):

                def run(tokens: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
                    every, (entered,) = examined(), tokens if stack.entry is None else map(stack.entry, tokens)
                    (found,) = _run(every, impl, entered, cu_seqlens, max_seqlen, buckets=stack.buckets)
                    return [found if stack.exit is None else stack.exit(found)]

                graphs = _kept(own, "_ctxfast_graphs", _graphs) if own.get("cuda_graphs", True) else None
                options = dict(is_still=is_still, prepare=partial(known.lay_out, stack, kind._kind))
                packed = (packing.pack(x),)
                (found,) = encoder.encode(run, self, graphs, packed, *_places(packing, texts), **options)
                return kind._result(last_hidden_state=packing.unpack(found))
            states = _padded(x, packing, texts, stack, examined(), impl, collects)
        except _NotOurs:
            return None
        if kind._kind.is_older and collects:
            return kind._result(last_hidden_state=states[-1], hidden_states=tuple(states))
        return kind._result(last_hidden_state=states[-1])

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in its place: the original over the same parts."""
        original = self._original
        plain = original.__new__(original)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in OWN_NAMES})
        return plain

    @classmethod
    def _is_plain_call(cls, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the arguments ask for nothing but hidden states, and nobody looks on."""
        if any([value is not None and value is not False and name not in _HARMLESS for name, value in kwargs.items()]):
            if kwargs.get("output_attentions"):
                _warn_of_attentions()
            return False
        if cls._kind.is_older and not kwargs.get("return_dict", cls._kind.returns_dict):
            return False
        if kwargs.get("use_cache") and cls._kind.has_cache:
            return False
        if _collected("attentions"):
            _warn_of_attentions()
            return False
        if torch.nn.modules.module._has_any_global_hook() or not identity.is_ordinary(x, mask):
            return False
        # Somebody replaced the encoder's own forward, for all encoders of its kind.
        return cls._original.forward is _forwards[cls._kind]


def _places(packing: Packing, texts: Sequence[int] | None) -> tuple[Tensor, int]:
    """Offsets of packed texts, or of ``texts`` in one row, and the length of the longest."""
    if texts is None:
        return packing.cu_seqlens, packing.max_seqlen
    offsets = transfer.to_device(torch.tensor(texts, dtype=torch.int32), packing.device)
    return offsets, max(end - start for start, end in pairwise(texts))


def _padded(
    x: Tensor,
    packing: Packing,
    texts: Sequence[int] | None,
    stack: Stack,
    every: Sequence[Layer],
    impl: str | None,
    collects: bool,
    rotary: Rotary | None = None,
) -> list[Tensor]:
    """What layers make of hidden states (B, L, N): with ``collects`` what each does, which hooks on it are shown, and
    what goes into the first; the result is the last."""
    packed, padded, places = packing.pack(x), x, _places(packing, texts)
    if stack.entry is not None:
        packed = stack.entry(packed)
        padded = packing.unpack(packed)
    states_of_all = [padded]
    for recompute, group in groupby(zip(stack.layers, every), key=lambda pair: _recompute(pair[0])):
        modules, found = zip(*group)
        states = _run(found, impl, packed, *places, collects, recompute, stack.buckets, rotary)
        packed = states[-1]
        for layer, state in zip(modules, states[1:]):  # none where no states are collected
            before, padded = padded, packing.unpack(state)
            states_of_all.append(padded)
            for hook in layer._forward_hooks.values():
                hook(layer, (before,), padded)
    if stack.exit is not None:
        return [*states_of_all[:-1], packing.unpack(stack.exit(packed))]
    return states_of_all if collects else [packing.unpack(packed)]


def _given(kind: Kind, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]] | None:
    """Hidden states, the mask and other arguments of a call; None for a call that is not one of an encoder's."""
    names = kind.arguments
    if len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
        return None
    others = {**dict(zip(names, args)), **kwargs}
    x = others.pop(names[0], None)
    return (x, others.pop("attention_mask", None), others) if isinstance(x, Tensor) and x.dim() == 3 else None


def _kept(own: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
    """What stands in a module's ``__dict__``, made with the first call."""
    found = own.get(name)
    return own.setdefault(name, make()) if found is None else found


def _graphs() -> PackedGraphs:
    return PackedGraphs(is_harmless=transformers_layers.is_capture)


def _packing(x: Tensor, mask: Any, is_asked: bool, has_places: bool) -> Packing | None:
    """Where the tokens are; None if that is unknown, or not worth it where nobody asked for more than speed; or if
    distances count (``has_places``) and a text has holes, which packed rows lose."""
    batch, length = x.shape[:2]
    if mask is None:
        return None if not is_asked and is_dense(x, batch * length) else Packing.full(batch, length, x.device)
    found = None if length == 0 else real_tokens(mask, batch, length)
    if found is not None and has_places:
        found = found[0], found[1] & (found[0][:, 1:] <= found[0][:, :-1]).all()
    packing = None if found is None else Packing.from_tokens(*found)
    return None if packing is None or (not is_asked and is_dense(x, packing.total)) else packing


def is_dense(x: Tensor, tokens: int) -> bool:
    """Whether a batch has so little padding that the original is faster."""
    if x.device.type != "cpu":
        return False
    if x.dtype in (torch.float32, torch.bfloat16) and not torch.is_grad_enabled() and capability.is_mkl_slow():
        return False
    return tokens > _DENSE * x.shape[0] * x.shape[1]


# On a CPU, both are equally fast about here: without any padding, Hugging Face's encoder takes 0.81 (MiniLM, 16 tokens)
# to 0.95 (8 x 128) of the packed one's time in float32, 0.87 in bfloat16 (2 threads of a Xeon, 2026-11-23, layers part
# by part). Where torch multiplies by an MKL that is slow the packed one is faster without any padding too: 1.5 times
# in both (BERT-Base, 1 x 128, 2 threads of a Zen 4, 2026-11-28).
_DENSE = 0.9

# Arguments that change nothing in what an encoder computes. Any other that is given is one for the original.
_HARMLESS = frozenset(
    ("use_cache", "position_ids", "return_dict", "output_hidden_states", "num_items_in_batch", "output_router_logits")
)
# In the __dict__ of a swapped encoder, and not in that of an original.
OWN_NAMES = (
    *("_ctxfast_original", "impl", "padding", "weight_dtype", "cuda_graphs", "_ctxfast_graphs", "_ctxfast_layers"),
)


def _warn_of_attentions() -> None:
    warnings.warn(
        "ctxfast.swap_in: attention weights were asked for, which packed attention never holds; such calls run Hugging "
        "Face's encoder.",
        stacklevel=4,
    )


def _collected(key: str) -> bool:
    """Whether Transformers collects these outputs in this call."""
    collector = import_module("transformers.utils.output_capturing")._active_collector.get()
    return collector is not None and key in collector


_making = threading.Lock()
_forwards: dict[Kind, Any] = {}  # what each encoder's own forward was when its class was made
# Names of the classes that take the place of encoders' -> full names of those.
_PACKED: dict[str, str] = {}
for _full in ENCODERS:
    _name = _full.rpartition(".")[2]
    _PACKED[_name if _name not in _PACKED else f"{_full.split('.')[2]}_{_name}"] = _full


def packed_class(full_name: str) -> type[PackedEncoder]:
    """The class that modules of this encoder class are given. Made once, so that pickles find it."""
    name = next(name for name, full in _PACKED.items() if full == full_name)
    with _making:
        if name not in globals():
            kind = ENCODERS[full_name]
            modeling = import_module(kind.modeling)
            original = getattr(modeling, kind.name)
            outputs = import_module("transformers.modeling_outputs")
            result = getattr(outputs, kind.result, None) or getattr(modeling, kind.result)
            values = {"__module__": __name__, "_kind": kind, "_result": result, "_original": original}
            _forwards[kind] = original.forward
            globals()[name] = type(name, (PackedEncoder, original), values)
            if kind.is_model:
                transformers_models.record_as(globals()[name], original)
        return globals()[name]


def __getattr__(name: str) -> Any:
    """Classes of swapped encoders: a pickle asks for one before anything is swapped in its process."""
    if name not in _PACKED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return packed_class(_PACKED[name])
