# SPDX-License-Identifier: Apache-2.0
"""Encoders of Hugging Face's Transformers (version 5) over packed tokens, for ``ctxfast.swap_in``.

The layers stay Hugging Face's modules and hold the parameters; only the encoder's ``forward`` is another one, which
drops padding, reads the layers' parameters, and puts padding back. What it cannot do it leaves to the original.
Transformers is imported with the first encoder that is swapped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._core import capability, registry
from .._core.weight_cache import WeightCache
from ..packing import Packing
from . import whole_layer
from .graphs import PackedGraphs, is_capture
from .layer_norm import LayerNorm

_fused = WeightCache()


@dataclass(frozen=True)
class Parts:
    """The modules of one layer, whatever its names for them, and what else its arithmetic needs."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    project: nn.Linear
    attention_norm: nn.LayerNorm
    widen: nn.Linear
    narrow: nn.Linear
    output_norm: nn.LayerNorm
    activation: nn.Module
    heads: int
    attention_dropout: nn.Dropout
    project_dropout: nn.Dropout | None
    output_dropout: nn.Dropout
    containers: tuple[nn.Module, ...]  # modules between the layer and these, which may have hooks too

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.project, self.widen, self.narrow

    @property
    def norms(self) -> tuple[nn.LayerNorm, ...]:
        return self.attention_norm, self.output_norm

    @property
    def dropouts(self) -> tuple[nn.Dropout, ...]:
        every = (self.attention_dropout, self.project_dropout, self.output_dropout)
        return tuple(dropout for dropout in every if dropout is not None)


def _bert_parts(layer: nn.Module) -> Parts:
    attention, own = layer.attention, layer.attention.self
    return Parts(
        query=own.query,
        key=own.key,
        value=own.value,
        project=attention.output.dense,
        attention_norm=attention.output.LayerNorm,
        widen=layer.intermediate.dense,
        narrow=layer.output.dense,
        output_norm=layer.output.LayerNorm,
        activation=layer.intermediate.intermediate_act_fn,
        heads=own.num_attention_heads,
        attention_dropout=own.dropout,
        project_dropout=attention.output.dropout,
        output_dropout=layer.output.dropout,
        containers=(attention, own, attention.output, layer.intermediate, layer.output),
    )


def _distilbert_parts(layer: nn.Module) -> Parts:
    attention, ffn = layer.attention, layer.ffn
    return Parts(
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        project=attention.out_lin,
        attention_norm=layer.sa_layer_norm,
        widen=ffn.lin1,
        narrow=ffn.lin2,
        output_norm=layer.output_layer_norm,
        activation=ffn.activation,
        heads=attention.n_heads,
        attention_dropout=attention.dropout,
        project_dropout=None,
        output_dropout=ffn.dropout,
        containers=(attention, ffn),
    )


_MODELS = "transformers.models"
# Encoder's full name -> class of its layers, how their parts are found, class of its result.
ENCODERS: dict[str, tuple[str, Callable[[nn.Module], Parts], str]] = {
    f"{_MODELS}.{model}.modeling_{model}.{name}Encoder": (
        f"{name}Layer",
        _bert_parts,
        "BaseModelOutputWithPastAndCrossAttentions",
    )
    for model, name in (
        ("bert", "Bert"),
        ("roberta", "Roberta"),
        ("xlm_roberta", "XLMRoberta"),
        ("camembert", "Camembert"),
        ("electra", "Electra"),
        ("ernie", "Ernie"),
    )
}
ENCODERS[f"{_MODELS}.distilbert.modeling_distilbert.Transformer"] = (
    "TransformerBlock",
    _distilbert_parts,
    "BaseModelOutput",
)
_PARTS = {layer: parts for layer, parts, _ in ENCODERS.values()}

# Encoders that look alike and cannot be swapped.
NEAR_MISSES = {
    "MPNetEncoder": "it adds a relative position bias to every attention score, which ctxfast.attention does not.",
    "DebertaV2Encoder": "its attention scores hold terms of relative positions, which ctxfast.attention does not.",
    "DebertaEncoder": "its attention scores hold terms of relative positions, which ctxfast.attention does not.",
    "XLMRobertaXLEncoder": "its layers normalise before they compute, not after.",
    "RobertaPreLayerNormEncoder": "its layers normalise before they compute, not after.",
    "AlbertTransformer": "its layers share weights in groups; use ctxfast for BERT, RoBERTa, ELECTRA or DistilBERT.",
}
PADDING_IS_READ = "batches with padding run as before: a question-answering head scores padding, too."

_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "Tanh": "tanh",
}


def _activation(module: Any) -> str | None:
    """The activation's name in ``ctxfast.linear_act``; None if it has none."""
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS.get(type(module).__name__)


def parts_of(layer: nn.Module) -> Parts:
    """The parts of a layer of a known class."""
    return _PARTS[type(layer).__name__](layer)


def reads_padding(above: Sequence[nn.Module]) -> bool:
    """Whether a model around an encoder reads hidden states at padding."""
    return any(type(module).__name__.endswith("ForQuestionAnswering") for module in above)


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of peft's around a Linear: it works on rows, so packed ones will do."""
    is_peft = any(kind.__module__.startswith("peft.tuners.") for kind in type(module).__mro__)
    return is_peft and type(getattr(module, "base_layer", None)) is nn.Linear


def _odd(parts: Parts) -> str | None:
    """Why a layer cannot be computed from its parameters alone; None if it can."""
    for linear in parts.linears:
        if type(linear) is not nn.Linear and not _is_adapter(linear):
            return f"a layer holds a {type(linear).__name__} where torch.nn.Linear was (an adapter, or quantised)."
    for norm in parts.norms:
        if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.weight is None or norm.bias is None or norm.eps <= 0:
            return f"a layer holds a {type(norm).__name__} where a plain torch.nn.LayerNorm was."
    for dropout in parts.dropouts:
        if type(dropout) is not nn.Dropout or dropout.p >= 1:
            return f"a layer holds {dropout} where a plain torch.nn.Dropout was."
    if _activation(parts.activation) is None:
        return f"its activation {type(parts.activation).__name__} is none of ctxfast.linear_act's."
    biases = [linear.bias is None for linear in (parts.query, parts.key, parts.value)]
    if any(biases) and not all(biases):
        return "only some of query, key and value have a bias."
    first = parts.query.weight
    for module in (*parts.linears, *parts.norms):
        if module.weight.dtype != first.dtype or module.weight.device != first.device:
            return "the parameters of a layer differ in dtype or device."
    return None


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
    expected, _, _ = ENCODERS[f"{type(encoder).__module__}.{type(encoder).__qualname__}"]
    if len(encoder.layer) == 0:
        return "it has no layers."
    for layer in encoder.layer:
        if type(layer).__name__ != expected:
            return f"a layer is a {type(layer).__name__}, not a {expected}."
        if getattr(layer, "is_decoder", False):
            return "it is a decoder: its attention looks back only, or across to an encoder."
        reason = _odd(parts_of(layer))
        if reason is not None:
            return reason
    return None


_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see a module's inputs or outputs, beside Transformers itself."""
    state = module.__dict__
    if any(state[name] for name in _HOOKS) or "forward" in state:
        return True
    return bool(state["_forward_hooks"]) and not all(is_capture(hook) for hook in state["_forward_hooks"].values())


def _plain_parts(layer: nn.Module) -> Parts | None:
    """The parts of a layer that can be computed packed now; None if it must be called."""
    find = _PARTS.get(type(layer).__name__)
    if find is None or _has_hooks(layer):
        return None
    parts = find(layer)
    # Oddness first: it makes sure that the rest are modules.
    if _odd(parts) is not None:
        return None
    inner = (*parts.containers, *parts.linears, *parts.norms, *parts.dropouts, parts.activation)
    return None if any(_has_hooks(module) for module in inner) else parts


def _rate(dropout: nn.Dropout | None) -> float:
    return dropout.p if dropout is not None and dropout.training else 0.0


def _qkv(parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Weight (3N, N) and bias (3N,) of one product for query, key and value."""
    linears = (parts.query, parts.key, parts.value)
    sources = [linear.weight for linear in linears]
    has_bias = parts.query.bias is not None
    if has_bias:
        sources += [linear.bias for linear in linears]

    def join() -> tuple[Tensor, Tensor | None]:
        return torch.cat(sources[:3]), torch.cat(sources[3:]) if has_bias else None

    is_trained = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    # On a GPU nothing tells the host, without waiting, that weights are still what they were.
    if is_trained or torch.compiler.is_compiling() or sources[0].device.type != "cpu":
        return join()
    return _fused.get(sources, "qkv", join)


def _linear(module: nn.Linear, x: Tensor, has_bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """A product, and the bias that is still to be added if ``has_bias`` is False."""
    if type(module) is nn.Linear:
        product = functional.linear_act(x, module.weight, module.bias if has_bias else None)
        return product, None if has_bias else module.bias
    return module(x), None


def _query_key_value(parts: Parts, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(T, 3, H, D), and the bias (3, H, D) that is still to be added."""
    linears = (parts.query, parts.key, parts.value)
    if all(type(linear) is nn.Linear for linear in linears):
        weight, bias = _qkv(parts)
        heads = (3, parts.heads, weight.shape[0] // (3 * parts.heads))
        return functional.linear_act(x, weight).unflatten(-1, heads), None if bias is None else bias.view(heads)
    products = [_linear(linear, x)[0].unflatten(-1, (parts.heads, -1)) for linear in linears]
    return torch.stack(products, dim=1), None


def _whole(parts: Parts) -> whole_layer.Layer | None:
    """What one call needs to compute a layer; None where its parts must be called."""
    if any(type(linear) is not nn.Linear for linear in parts.linears):
        return None
    if any(_rate(dropout) for dropout in parts.dropouts) or parts.attention_norm.eps != parts.output_norm.eps:
        return None
    modules = (parts.project, parts.attention_norm, parts.widen, parts.narrow, parts.output_norm)
    weights = (*_qkv(parts), *(tensor for module in modules for tensor in (module.weight, module.bias)))
    options = dict(num_heads=parts.heads, activation=_activation(parts.activation), eps=parts.output_norm.eps)
    return whole_layer.Layer(weights, options)


def _run_whole(
    every: Sequence[Parts], impl: str | None, x: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor] | None:
    """What the last of these layers gives, by one call; None where it cannot be done so."""
    with nullcontext() if impl is None else registry.use_impl(impl):
        if not whole_layer.is_open(x):
            return None
        return whole_layer.run(x, cu_seqlens, max_seqlen, [_whole(parts) for parts in every])


def _run_layer(parts: Parts, impl: str | None, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One post-LN layer over packed tokens, (T, N) -> (T, N)."""
    whole = _run_whole([parts], impl, x, cu_seqlens, max_seqlen)
    if whole is not None:
        return whole[0]
    with nullcontext() if impl is None else registry.use_impl(impl):
        qkv, bias = _query_key_value(parts, x)
        context = functional.attention(qkv, cu_seqlens, max_seqlen, bias, dropout_p=_rate(parts.attention_dropout))
        norm = parts.attention_norm
        projected, bias = _linear(parts.project, context.flatten(1), has_bias=False)
        x = functional.add_layer_norm(
            projected, x, norm.weight, norm.bias, bias, eps=norm.eps, dropout_p=_rate(parts.project_dropout)
        )
        if type(parts.widen) is nn.Linear:
            activation = _activation(parts.activation)
            wide = functional.linear_act(x, parts.widen.weight, parts.widen.bias, activation=activation)
        else:
            wide = parts.activation(parts.widen(x))
        norm = parts.output_norm
        narrow, bias = _linear(parts.narrow, wide, has_bias=False)
        return functional.add_layer_norm(
            narrow, x, norm.weight, norm.bias, bias, eps=norm.eps, dropout_p=_rate(parts.output_dropout)
        )


def _run_layers(
    every: Sequence[Parts], impl: str | None, tokens: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor]:
    """All layers over packed tokens, as CUDA graphs want it."""
    (x,) = tokens
    for parts in every:
        x = _run_layer(parts, impl, x, cu_seqlens, max_seqlen)
    return (x,)


def real_tokens(mask: Any, batch: int, length: int) -> Tensor | None:
    """(B, L) bool, where tokens are, from a mask as encoders get it; None if it is more than a padding mask.

    Masks: (B, L), nonzero for tokens; or (B, 1, L, L), bool or additive, made from such a one. Reads the values.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2 and tuple(mask.shape) == (batch, length):
        real = mask != 0
        return real if bool(real[:, 0].all()) else None
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != length:
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    row = seen[:, 0, 0]
    # Texts begin at column 0, and every query sees the same keys.
    good = row[:, 0].all()
    if mask.stride(2) != 0:
        good = good & (seen == row[:, None, None]).all()
    if mask.dtype != torch.bool:
        good = good & (seen | (mask <= -1e4)).all()
    return row.expand(batch, length) if bool(good) else None


class PackedEncoder(nn.Module):
    """What takes the place of an encoder's class: its ``forward`` without padding. First base of a class made by
    ``packed_class``, whose second base is the original."""

    impl: str | None = None
    padding_is_read: bool = False
    cuda_graphs: bool = True  # inference on a GPU goes through CUDA graphs; set it to False to switch them off
    _result: type

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        packing = self._packing(hidden_states, attention_mask, args, kwargs)
        if packing is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        passed = {name: value for name, value in kwargs.items() if name not in _ENCODER_ONLY}
        collects = _collected("hidden_states")
        packed, padded = packing.pack(hidden_states), hidden_states
        every = [_plain_parts(layer) for layer in self.layer]
        if not collects and None not in every:
            offsets, longest = packing.cu_seqlens, packing.max_seqlen
            if self.cuda_graphs and self._graphs.can_run(packed):
                run = partial(_run_layers, every, self.impl)
                whole = self._graphs.run(run, self, (packed,), offsets, longest)
            else:
                whole = _run_whole(every, self.impl, packed, offsets, longest)
            if whole is not None:
                return self._result(last_hidden_state=packing.unpack(whole[0]))
        for layer, parts in zip(self.layer, every):
            if parts is None:
                before = packing.unpack(packed) if padded is None else padded
                padded = layer(before, attention_mask, **passed)
                packed = packing.pack(padded)
                continue
            run = partial(_run_layer, parts, self.impl)
            if getattr(layer, "gradient_checkpointing", False) and layer.training:
                run = partial(layer._gradient_checkpointing_func, run)
            before, padded = padded, None
            packed = run(packed, packing.cu_seqlens, packing.max_seqlen)
            if collects:
                padded = packing.unpack(packed)
                for hook in layer._forward_hooks.values():
                    hook(layer, (before,), padded)
        return self._result(last_hidden_state=packing.unpack(packed) if padded is None else padded)

    @property
    def _graphs(self) -> PackedGraphs:
        return self.__dict__.setdefault("_ctxfast_graphs", PackedGraphs())

    def _packing(self, x: Tensor, mask: Any, args: tuple, kwargs: dict[str, Any]) -> Packing | None:
        """Where the tokens are; None if this call is one for the original."""
        if args or any(kwargs.get(name) is not None for name in _NOT_PACKED) or kwargs.get("use_cache"):
            return None
        if kwargs.get("output_attentions") or _collected("attentions"):
            warnings.warn(
                "ctxfast.swap_in: attention weights were asked for, which packed attention never holds; such calls "
                "run Hugging Face's encoder.",
                stacklevel=2,
            )
            return None
        if torch.nn.modules.module._has_any_global_hook():
            return None
        batch, length = x.shape[:2]
        if mask is None:
            return None if self._is_dense(x, batch * length) else Packing.full(batch, length, x.device)
        if torch.compiler.is_compiling() or length == 0:  # the number of tokens is read from the mask
            return None
        real = real_tokens(mask, batch, length)
        if real is None:
            return None
        packing = Packing.from_mask(real)
        if self.padding_is_read and not packing.is_full:
            return None
        return None if self._is_dense(x, packing.total) else packing

    def _is_dense(self, x: Tensor, tokens: int) -> bool:
        """Whether a batch has so little padding that the original is faster."""
        if x.device.type != "cpu" or self.impl is not None or torch.compiler.is_compiling():
            return False
        if x.dtype in (torch.float32, torch.bfloat16) and not torch.is_grad_enabled() and capability.is_mkl_slow():
            return False
        return tokens > _DENSE * x.shape[0] * x.shape[1]


# On a CPU, both are equally fast about here: without any padding, Hugging Face's encoder takes 0.81 (MiniLM, 16 tokens)
# to 0.95 (8 x 128) of the packed one's time in float32, 0.87 in bfloat16 (2 threads of a Xeon, 2026-11-23, layers part
# by part). Where torch multiplies by an MKL that is slow the packed one is faster without any padding too: 1.5 times
# in both (BERT-Base, 1 x 128, 2 threads of a Zen 4, 2026-11-28).
_DENSE = 0.9

# Arguments of calls that the original runs.
_NOT_PACKED = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cu_seq_lens_q")
# Arguments that an encoder does not hand on to its layers as they are.
_ENCODER_ONLY = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache")


def _collected(key: str) -> bool:
    """Whether Transformers collects these outputs in this call."""
    collector = import_module("transformers.utils.output_capturing")._active_collector.get()
    return collector is not None and key in collector


def packed_class(full_name: str) -> type[PackedEncoder]:
    """The class that modules of this encoder class are given."""
    return __getattr__(full_name.rpartition(".")[2])


def __getattr__(name: str) -> Any:
    """Classes of swapped encoders, made when first asked for: pickles find them here, too."""
    found = next((full for full in ENCODERS if full.rpartition(".")[2] == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, result = found.rpartition(".")[0], *ENCODERS[found][1:]
    original = getattr(import_module(module), name)
    outputs = import_module("transformers.modeling_outputs")
    made = type(name, (PackedEncoder, original), {"__module__": __name__, "_result": getattr(outputs, result)})
    globals()[name] = made
    return made
