# SPDX-License-Identifier: Apache-2.0
"""torch's own encoder over packed tokens, for ``ctxfast.swap_in``: ``torch.nn.TransformerEncoder``, and its layer by
itself.

The layers stay torch's modules and hold the parameters; the swapped module's ``forward`` drops padding, reads their
parameters, and puts padding back. What it cannot do it leaves to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core import choice
from ..nn import encoder, tools
from ..ops.shared.weight_cache import forget_packed
from ..packing import Packing
from . import identity, padding_readers
from .masks import kept_keys
from .transformers import is_dense
from .transformers_layers import activation_of
from .transformers_parts import rate

_PLACE = "torch.nn.modules.transformer"
_FORWARDS = {kind: kind.forward for kind in (nn.TransformerEncoder, nn.TransformerEncoderLayer)}
_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}
_STATE = "_ctxfast_layers"
MAY_READ = (
    "batches with padding run as before where torch's own encoder computes values there (in training, with gradients), "
    "as what stands around it may read them; if it does not, pass padding='zero'."
)


def layers_of(module: nn.Module) -> list[Any]:
    """The layers of an encoder; a layer is one by itself."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return [module]
    return list(module.layers) if isinstance(module.layers, nn.ModuleList) else []


def layers_in(module: nn.Module) -> list[Any]:
    """The layers that an encoder of torch's runs; none for any other module."""
    return layers_of(module) if isinstance(module, nn.TransformerEncoder) else []


class State:
    """What stood inside a module when it was examined. Copies and pickles of it are empty: the copy is examined anew.

    Attributes:
        is_right: whether its layers are torch's own, of a kind that is computed here.
    """

    def __init__(self, module: nn.Module) -> None:
        self.is_right = _odd(module) is None
        self.inside = identity.Inside(module)
        self._layers = layers_of(module)
        self._activations = list(map(_function, self._layers))

    def is_still(self) -> bool:
        """Whether all is as it was."""
        return self.inside.is_still() and list(map(_function, self._layers)) == self._activations

    def __reduce__(self) -> tuple:
        return _nothing, ()

    def __deepcopy__(self, memo: dict) -> None:
        return None


def _function(layer: nn.Module) -> Any:
    """The activation of a layer where it is a function."""
    return layer.__dict__.get("activation")


def _nothing() -> None:
    return None


class _Packed(nn.Module):
    """What the two swapped classes share: the first of their bases."""

    impl: str | None = None
    padding: str = "zero"
    weight_dtype: torch.dtype | None = None
    _original: Any

    def _packed(
        self, kind: type[_Packed], src: Any, mask: Tensor | None, padding_mask: Tensor | None, is_causal: bool | None
    ) -> Tensor | None:
        """The result; None if this call is one for torch's own code. Asks the module for its class no more: another
        thread may be restoring it."""
        own, original = self.__dict__, kind._original
        impl, weight_dtype = own.get("impl"), own.get("weight_dtype")
        if not isinstance(src, Tensor) or src.is_nested or src.dim() != 3 or mask is not None or is_causal:
            return None
        if original.forward is not _FORWARDS[original] or torch.nn.modules.module._has_any_global_hook():
            return None
        if not identity.is_ordinary(src, padding_mask) or not _is_still(self):
            return None
        layers = layers_of(self)
        x = src if layers[0].self_attn.batch_first else src.transpose(0, 1)
        packing = _packing(x, padding_mask)
        if packing is None or (impl is None and weight_dtype is None and is_dense(x, packing.total)):
            return None
        padding = own.get("padding", _Packed.padding)
        if not packing.is_full and padding_readers.is_read(padding, False) and not _is_zero(self, layers, packing):
            return None
        described = (_weights(layer, weight_dtype) for layer in layers)
        with nullcontext() if impl is None else choice.use_impl(impl):
            found = encoder.run(described, packing.pack(x), packing.cu_seqlens, packing.max_seqlen)[0]
        found = packing.unpack(found)
        return found if x is src else found.transpose(0, 1)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in its place: the original over the same parts."""
        plain = self._original.__new__(self._original)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in OWN_NAMES})
        return plain


# In the __dict__ of a swapped module, and not in that of an original.
OWN_NAMES = ("_ctxfast_original", "impl", "padding", "weight_dtype", _STATE)


class TransformerEncoder(_Packed, nn.TransformerEncoder):
    """A swapped ``torch.nn.TransformerEncoder``."""

    _original = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As ``torch.nn.TransformerEncoder``."""
        kind = type(self)
        if not issubclass(kind, _Packed):  # restored, and somebody kept this function
            return kind.forward(self, src, mask, src_key_padding_mask, is_causal)
        found = None
        if not torch.compiler.is_compiling():
            found = kind._packed(self, kind, src, mask, src_key_padding_mask, is_causal)
        if found is None:
            return nn.TransformerEncoder.forward(self, src, mask, src_key_padding_mask, is_causal)
        return found if self.norm is None else self.norm(found)


class TransformerEncoderLayer(_Packed, nn.TransformerEncoderLayer):
    """A swapped ``torch.nn.TransformerEncoderLayer`` that stands in no ``torch.nn.TransformerEncoder``."""

    _original = nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As ``torch.nn.TransformerEncoderLayer``."""
        kind = type(self)
        if not issubclass(kind, _Packed):
            return kind.forward(self, src, src_mask, src_key_padding_mask, is_causal)
        found = None
        if not torch.compiler.is_compiling():
            found = kind._packed(self, kind, src, src_mask, src_key_padding_mask, is_causal)
        if found is None:
            return nn.TransformerEncoderLayer.forward(self, src, src_mask, src_key_padding_mask, is_causal)
        return found


SWAPPED: dict[str, type[nn.Module]] = {
    f"{_PLACE}.{kind.__name__}": kind for kind in (TransformerEncoder, TransformerEncoderLayer)
}


def swapped_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that modules of one of torch's are given."""
    return SWAPPED[f"{kind.__module__}.{kind.__qualname__}"]


def _is_still(module: nn.Module) -> bool:
    """Whether what stands in a module is what was found right; it is examined again where something changed."""
    state = module.__dict__.get(_STATE)
    if state is None or not state.is_still():
        state = module.__dict__[_STATE] = State(module)
    return state.is_right and not state.inside.is_watched


def _packing(x: Tensor, padding_mask: Any) -> Packing | None:
    """Where the tokens of (B, L, N) are, by a mask of keys to leave out: bool, or added to scores; None if that is
    unknown."""
    batch, length = x.shape[:2]
    if padding_mask is None:
        return Packing.full(batch, length, x.device)
    if not isinstance(padding_mask, Tensor) or tuple(padding_mask.shape) != (batch, length) or length == 0:
        return None
    if padding_mask.dtype == torch.bool:
        return Packing.from_tokens(~padding_mask)
    if not padding_mask.is_floating_point() or (padding_mask.requires_grad and torch.is_grad_enabled()):
        return None
    return Packing.from_tokens(*kept_keys(padding_mask[:, None, None]))


def _is_zero(module: nn.Module, layers: list[Any], packing: Packing) -> bool:
    """Whether torch's own encoder would drop padding in this call, too, and put zeros there."""
    if not getattr(module, "use_nested_tensor", False) or layers[0].training:
        return False
    if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled(packing.device.type):
        return False
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
        return False
    # Texts begin at column 0 and have no holes: the last token's column tells.
    lengths = torch.tensor(packing.lengths, device=packing.device)
    return not packing.has_empty and bool((packing.columns[packing.cu_seqlens[1:] - 1] == lengths - 1).all())


def _activation(layer: Any) -> str | None:
    activation = layer.activation
    return activation_of(activation) if isinstance(activation, nn.Module) else _FUNCTIONS.get(activation)


def _dropped(x: Tensor, p: float, linear: nn.Linear, weight_dtype: torch.dtype | None) -> Tensor:
    return tools.linear(F.dropout(x, p), linear, weight_dtype=weight_dtype)


def _weights(layer: Any, weight_dtype: torch.dtype | None) -> encoder.LayerWeights:
    attention, p = layer.self_attn, rate(layer.dropout)
    narrow: Callable[[Tensor], Tensor] | Tensor = layer.linear2.weight
    if p > 0:  # elements inside the feed-forward block are dropped, which no op does
        narrow = partial(_dropped, p=p, linear=layer.linear2, weight_dtype=weight_dtype)
    options = encoder.LayerOptions(
        attention.num_heads,
        _activation(layer) or "",
        (layer.norm1.eps, layer.norm2.eps),
        weight_dtype,
        (attention.dropout if attention.training else 0.0, rate(layer.dropout1), rate(layer.dropout2)),
        by_ops=p > 0,
        is_pre_norm=layer.norm_first,
    )
    tensors = (
        attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias,
        layer.norm1.weight, layer.norm1.bias, layer.linear1.weight, layer.linear1.bias,
        narrow, None if p > 0 else layer.linear2.bias, layer.norm2.weight, layer.norm2.bias,
    )  # fmt: skip
    return encoder.LayerWeights(tensors, options)


_PARTS = {"linear1": nn.Linear, "linear2": nn.Linear, "norm1": nn.LayerNorm, "norm2": nn.LayerNorm}
_PARTS |= dict.fromkeys(("dropout", "dropout1", "dropout2"), nn.Dropout)


def _odd(module: nn.Module) -> str | None:
    """Why a module stays as it is, by what it holds."""
    layers = layers_of(module)
    if not layers:
        return "it has no layers in a torch.nn.ModuleList."
    for layer in layers:
        reason = _odd_layer(layer)
        if reason is not None:
            return reason
    tensors = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    if any(tensor.is_meta for tensor in tensors):
        return "its parameters are on the meta device; load them first."
    for tensor in tensors:
        if type(tensor) not in identity.PLAIN or tensor.layout is not torch.strided:
            return f"a weight is a {type(tensor).__name__} of layout {tensor.layout}."
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
            return "its parameters differ in dtype or device."
    if len({layer.self_attn.batch_first for layer in layers}) > 1:
        return "only some of its layers have the batch first."
    return next(iter(_not_torchs(_kinds(layers))), identity.torch_objection())


def _kinds(layers: Iterable[nn.Module]) -> set[type]:
    kinds = {type(part) for layer in layers for part in layer.modules()}
    return {kind for kind in kinds if not kind.__module__.startswith("ctxfast.")}


def _not_torchs(kinds: set[type]) -> Iterable[str]:
    return filter(None, (identity.why_not_stock(kind, "torch") for kind in kinds))


def _odd_layer(layer: Any) -> str | None:
    if type(layer) not in (nn.TransformerEncoderLayer, TransformerEncoderLayer):
        return f"a layer is a {type(layer).__name__}, not a torch.nn.TransformerEncoderLayer."
    attention = layer.self_attn
    if type(attention) is not nn.MultiheadAttention:
        return f"a layer holds a {type(attention).__name__} where torch.nn.MultiheadAttention was."
    for name, kind in _PARTS.items():
        if type(getattr(layer, name)) is not kind:
            return f"a layer holds a {type(getattr(layer, name)).__name__} where torch.nn.{kind.__name__} was."
    if not isinstance(attention.out_proj, nn.Linear) or type(attention.out_proj).forward is not nn.Linear.forward:
        return f"a layer holds a {type(attention.out_proj).__name__} where torch.nn.Linear was."
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return "its attention has keys of another size, or keys that are no tokens."
    if "in_proj_weight" not in attention._parameters or any(
        "weight" not in part._parameters for part in (layer.linear1, layer.linear2, layer.norm1, layer.norm2)
    ):
        return "a weight is no parameter of its layer (pruned, normalised or parametrised)."
    if any(norm.weight is None or norm.bias is None or norm.eps <= 0 for norm in (layer.norm1, layer.norm2)):
        return "a LayerNorm of it has no bias."
    if any(not 0 <= p < 1 for p in (attention.dropout, layer.dropout.p, layer.dropout1.p, layer.dropout2.p)):
        return "it drops with a probability of 1."
    if _activation(layer) is None:
        return f"its activation {layer.activation!r:.60} is none of ctxfast.linear_act's."
    return None


# How far results on a small input may lie apart, relative to the largest, where only the order of sums differs.
_BOUNDS = {torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


def objection(why_not: Callable[..., str | None], module: nn.Module, impl: str | None) -> str | None:
    """Why a module of torch's classes stays as it is; None if it can be swapped. ``why_not``: see ``in_place``."""
    reason = next(iter(_not_torchs({type(module)})), None) or _odd(module)
    if reason is not None:
        return reason
    attention = layers_of(module)[0].self_attn
    qkv = attention.in_proj_weight.new_zeros(1, 3, attention.num_heads, attention.head_dim)
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=qkv.device)
    reason = why_not("attention", impl, qkv=qkv, cu_seqlens=offsets, max_seqlen=1)
    return difference(module, impl) if reason is None else reason


def narrow_objection(
    why_not: Callable[..., str | None], module: nn.Module, impl: str | None, weight_dtype: torch.dtype
) -> str | None:
    """Why products cannot be computed in this dtype; None if they can."""
    if weight_dtype is not torch.int8:
        return f"weight_dtype is {weight_dtype}; expected torch.int8 for an encoder."
    weight = layers_of(module)[0].linear1.weight
    return why_not("linear_act", impl, x=weight.new_zeros(1, weight.shape[1]), weight=weight, weight_dtype=weight_dtype)


def difference(module: nn.Module, impl: str | None) -> str | None:
    """Runs a module both ways on a small ragged input: None if the results are the same, else a sentence."""
    if identity.Inside(module).is_watched or torch.nn.modules.module._has_any_global_hook():
        return None
    kind: Any = swapped_class(type(module))
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    weight = layers_of(module)[0].linear1.weight
    other.__dict__.update(impl=impl if weight.device.type == "cpu" else "reference", padding="zero")
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=weight.device)
    with identity.undisturbed(module):
        x = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
        is_first = layers_of(module)[0].self_attn.batch_first
        given = x if is_first else x.transpose(0, 1)
        results = [each(given, src_key_padding_mask=~real) for each in (partial(type(module).forward, module), other)]
        expected, found = ((each if is_first else each.transpose(0, 1))[real].double() for each in results)
    forget_packed(module)
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if apart <= _BOUNDS.get(weight.dtype, 0.0):
        return None
    return f"on a small input its own result and the packed one are {apart:.2g} of the largest value apart."
