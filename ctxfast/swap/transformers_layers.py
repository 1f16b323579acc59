# SPDX-License-Identifier: Apache-2.0
"""The layers of Hugging Face's encoders as ``ctxfast.swap_in`` sees them: where each part of one is, whether it still
is what Hugging Face made it, and the tensors it computes with.

A layer is looked at twice. Once slowly (``examine``): classes, functions, attributes and shapes of every part, with a
sentence where something is not Hugging Face's own. And at every call quickly (``Layer.tensors``): whether the objects
are still the ones that were examined. Whatever changed meanwhile is examined again, and what does not pass is left to
the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core import choice
from ..nn import encoder, tools
from ..nn.layer_norm import LayerNorm
from ..nn.watched import Snapshot
from ..ops.shared.weight_cache import WeightCache
from . import attention_interface, identity, side_by_side
from .transformers_parts import Kind, Parts, Stack, rate

# Classes of activations (package, module, name) -> what ctxfast.linear_act calls them.
_ACTIVATIONS = {
    ("transformers", "transformers.activations", "GELUActivation"): "gelu",
    ("transformers", "transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers", "transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("torch", "torch.nn.modules.activation", "GELU"): "gelu",
    ("torch", "torch.nn.modules.activation", "ReLU"): "relu",
    ("torch", "torch.nn.modules.activation", "Tanh"): "tanh",
    ("transformers", "transformers.activations", "SiLUActivation"): "silu",
    ("torch", "torch.nn.modules.activation", "SiLU"): "silu",
}


def activation_of(module: Any) -> str | None:
    """The activation's name in ``ctxfast.linear_act``; None if it has none."""
    kind = type(module)
    for (package, place, name), activation in _ACTIVATIONS.items():
        if kind.__name__ == name and identity.is_stock(kind, package, place, name):
            if kind is nn.GELU:
                return "gelu_tanh" if module.approximate == "tanh" else "gelu"
            act = module.__dict__.get("act")  # the function that Transformers' modules of this kind call
            own = act is None or act is F.gelu or getattr(act, "__self__", None) is module
            tanh = getattr(act, "func", None) is F.gelu and act.keywords == {"approximate": "tanh"}
            return activation if own or (tanh and activation == "gelu_tanh") else None
    return None


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of peft's around a Linear: it works on rows, so packed ones will do."""
    is_peft = any(kind.__module__.startswith("peft.tuners.") for kind in type(module).__mro__)
    return is_peft and type(getattr(module, "base_layer", None)) is nn.Linear


_OWN_LEAVES = (nn.Linear, nn.LayerNorm, nn.Dropout)


def _odd_leaf(parts: Parts) -> str | None:
    for linear in parts.linears:
        if type(linear) is not nn.Linear and not _is_adapter(linear):
            return f"a layer holds a {type(linear).__name__} where torch.nn.Linear was (an adapter, or quantised)."
    for norm in parts.norms:
        is_layer_norm = type(norm) in (nn.LayerNorm, LayerNorm) and (norm.bias is not None or parts.is_pre_norm)
        # An RMSNorm is among the containers, whose classes were looked at.
        if not (is_layer_norm or parts.norm == "rms") or norm.weight is None or _eps(norm) <= 0:
            return f"a layer holds a {type(norm).__name__} where a plain torch.nn.LayerNorm was."
    for dropout in parts.dropouts:
        if type(dropout) is not nn.Dropout or dropout.p >= 1:
            return f"a layer holds {dropout} where a plain torch.nn.Dropout was."
    if activation_of(parts.activation) is None:
        return f"its activation {type(parts.activation).__name__} is none of ctxfast.linear_act's."
    for module in (*parts.linears, *parts.norms):
        if not _is_adapter(module) and "weight" not in module._parameters:
            return "a weight is no parameter of its layer (pruned, normalised or parametrised)."
        for name in ("weight", "bias"):
            tensor = getattr(module, name, None)
            if tensor is not None and tensor.layout is not torch.strided:
                return f"a {name} is a tensor of layout {tensor.layout}."
            if tensor is not None and type(tensor) not in identity.PLAIN:
                return f"a {name} is a {type(tensor).__name__}, a kind of tensor of its own (quantised or distributed)."
    return None


def _eps(norm: Any) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def _odd_sizes(parts: Parts) -> str | None:
    for linears in (parts.qkv, parts.widen):
        if len({linear.bias is None for linear in linears}) > 1:
            what = "query, key and value" if linears is parts.qkv else "the two halves of a gated block"
            return f"only some of {what} have a bias."
    first = parts.qkv[0].weight
    for module in (*parts.linears, *parts.norms):
        if module.weight.dtype != first.dtype or module.weight.device != first.device:
            return "the parameters of a layer differ in dtype or device."
    own, (inner, width) = parts.attention, parts.project.weight.shape[::-1]
    heads, kv_heads, wide = parts.heads, parts.kv_heads or parts.heads, parts.narrow.weight.shape[1]
    if not isinstance(heads, int) or heads < 1 or not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
        return f"{heads} heads of queries and {kv_heads} of keys do not fit each other."
    rows = [inner, *[inner // heads * kv_heads] * 2]
    shapes = [(each, width) for each in (rows if len(parts.qkv) == 3 else [sum(rows)])] + [(width, inner)]
    shapes += [(wide * (2 if parts.is_gated and len(parts.widen) == 1 else 1), width)] * len(parts.widen)
    if [tuple(linear.weight.shape) for linear in parts.linears] != [*shapes, (width, wide)]:
        return "its linear layers do not fit each other as those of one encoder layer do."
    if any(
        tuple(norm.weight.shape) != (width,) or getattr(norm, "normalized_shape", (width,)) != (width,)
        for norm in parts.norms
    ):
        return "a LayerNorm of it does not normalise over the hidden size."
    size = getattr(own, "attention_head_size", getattr(own, "head_dim", None))
    if size != inner / heads:
        return f"{heads} heads of size {size} do not make up the {inner} rows of its query."
    scaling = getattr(own, "scaling", size**-0.5)
    return None if scaling == size**-0.5 else f"it scales attention scores by {scaling}, not by {size**-0.5:.6g}."


def is_capture(hook: Callable) -> bool:
    """Whether a forward hook is Transformers' own, which collects hidden states and attention weights when they are
    asked for, and does nothing else."""
    return getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing")


def implementation(own: nn.Module, kind: Kind) -> str | None:
    """The name of what a layer's attention calls now; None where it computes its scores itself."""
    return None if kind.is_older else own.config._attn_implementation


def attention_function(own: nn.Module, kind: Kind) -> Any:
    """What a layer's attention calls now, looked up as Transformers does at every call; its own forward where it calls
    nothing."""
    name = implementation(own, kind)
    if name is None:
        return type(own).forward
    names = import_module(kind.modeling)
    return names.ALL_ATTENTION_FUNCTIONS.get_interface(name, names.eager_attention_forward)


_ATTENTION = ("sdpa_attention", "flash_attention", "flex_attention")


def _odd_attention(own: nn.Module, kind: Kind) -> str | None:
    function = attention_function(own, kind)
    places = (kind.modeling, *(f"transformers.integrations.{name}" for name in _ATTENTION))
    is_ours = getattr(function, "__module__", "") == attention_interface.__name__
    if is_ours or (
        getattr(function, "__module__", None) in places and identity.is_written_in(function, "transformers")
    ):
        return None
    return f"its attention is computed by a function of somebody's own, {implementation(own, kind)!r}."


def odd_around(stack: Stack, kind: Kind) -> str | None:
    """Why what an encoder runs besides its layers is not Hugging Face's; None if it is."""
    for module in stack.between:
        if not identity.is_stock(type(module), "transformers", kind.modeling, kind.between):
            return f"its layers stand in a {type(module).__name__}, not in a {kind.between}."
    entry, exit = stack.entry, stack.exit
    if exit is not None and type(exit) not in (nn.LayerNorm, LayerNorm):
        return f"a {type(exit).__name__} stands after its layers where torch.nn.LayerNorm was."
    if entry is not None and type(entry) is not nn.Linear:
        return f"a {type(entry).__name__} stands before its layers where torch.nn.Linear was."
    if entry is not None and {type(each) for each in entry._parameters.values()} - _PLAIN - {type(None)}:
        return "a weight before its layers is a kind of tensor of its own (quantised or distributed)."
    return None if stack.buckets is None else _odd_buckets(stack)


# Hugging Face's MPNet counts on so many, whatever its config says.
_BUCKETS = 32


def _odd_buckets(stack: Stack) -> str | None:
    table: Any = stack.buckets
    if type(table) is not nn.Embedding or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return f"its relative positions stand in a {type(table).__name__}, not in a plain torch.nn.Embedding."
    weight = table._parameters.get("weight")
    if type(weight) not in _PLAIN or len(weight) != _BUCKETS:
        return f"its table of relative positions is none of {_BUCKETS} buckets in a parameter of its own."
    return None


def examine(layer: nn.Module, kind: Kind) -> Layer | str:
    """The layer, if it computes what Hugging Face's own layer of this kind computes from its parameters; else why not.

    Hooks are no objection here: they come and go, and are looked for at every call.
    """
    name = type(layer).__name__
    for path, expected in kind.containers.items():
        part = layer
        for step in path.split(".") if path else ():
            part = part._modules.get(step) if isinstance(part, nn.Module) else None
        found = type(part)
        if not identity.is_stock(found, "transformers", kind.modeling, expected):
            if path == "" and found.__name__ != expected:
                return f"a layer is a {name}, not a {expected}."
            reason = identity.why_not_stock(found, "transformers") if issubclass(found, nn.Module) else None
            where = f"{expected} at {path}" if path else expected
            return f"a layer holds a {found.__name__} where {where} was{': ' + reason if reason else '.'}"
    if getattr(layer, "is_decoder", False) or getattr(layer, "is_cross_attention", False):
        return "it is a decoder: its attention looks back only, or across to an encoder."
    parts = kind.parts(layer)
    if getattr(parts.attention, "is_causal", False):
        return "it is a decoder: its attention looks back only, or across to an encoder."
    reason = _odd_leaf(parts) or _odd_sizes(parts) or _odd_attention(parts.attention, kind)
    if reason is None and not 0 <= parts.attention_p() < 1:
        reason = f"its attention drops weights with probability {parts.attention_p()}."
    if reason is None:
        reason = next(
            (why for leaf in _OWN_LEAVES if (why := identity.why_not_stock(leaf, "torch")) is not None),
            identity.torch_objection(),
        )
    for container in parts.containers:
        # Not forward: that is looked for at every call, and then the layer runs itself.
        own = (_functions(type(container)) - {"forward"}) & container.__dict__.keys()
        if own:
            reason = reason or f"{type(container).__name__}.{min(own)} was replaced on the object."
    return Layer(parts, kind) if reason is None else reason


def _functions(kind: type) -> frozenset[str]:
    return frozenset(name for _, name, _ in identity.running(kind))


_fused = WeightCache()
_PLAIN = frozenset(identity.PLAIN)
_STRIDED = {torch.strided}
_shape, _dtype, _device, _layout = map(attrgetter, ("shape", "dtype", "device", "layout"))


class Seen:
    """Layers as they were examined."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._snapshot = Snapshot.joined([layer.snapshot for layer in layers])
        places = [place for layer in layers for place in layer.places]
        self._places = list(zip(*[(table, name) for table, name in places if table[name] is not None]))
        self._shapes = list(map(_shape, map(dict.get, *self._places)))
        self._absent = [(table, name) for table, name in places if table[name] is None]

    def is_still(self) -> bool:
        """Whether every part is the object that it was, of the class that it was, and nobody looks at it; and all
        parameters are plain strided tensors of their shapes then, of one dtype on one device."""
        if not self._snapshot.is_still():
            return False
        tensors = list(map(dict.get, *self._places))
        return (
            _PLAIN.issuperset(map(type, tensors))
            and list(map(_shape, tensors)) == self._shapes
            and set(map(_layout, tensors)) == _STRIDED
            and len(set(map(_dtype, tensors))) == len(set(map(_device, tensors))) == 1
            and all([table.get(name) is None for table, name in self._absent])
        )


# The angles of positions (P, 2, R/2) by types of layers: see ``functional.attention``.
Rotary = Mapping[str, Tensor]


def _norm_tensors(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm._parameters["weight"], norm._parameters.get("bias"))


class Layer:
    """A layer that was examined. Called, it runs over packed tokens, (T, N) -> (T, N), with products as
    ``weight_dtype`` says."""

    weight_dtype: torch.dtype | None = None

    def __init__(self, parts: Parts, kind: Kind) -> None:
        self.parts, self.kind = parts, kind
        self._activation = activation_of(parts.activation)
        every = {id(module): module for module in parts.every}
        own = parts.attention.__dict__
        names = ("scaling", "attention_head_size", "head_dim", "num_attention_heads", "n_heads", "num_key_value_groups")
        settings = [*parts.settings, *((own, name) for name in names)]
        settings += [(own, "is_causal"), (own, "attention_dropout"), (parts.containers[0].__dict__, "is_decoder")]
        settings += [(parts.activation.__dict__, name) for name in ("act", "approximate")]
        settings += [
            (norm.__dict__, name) for norm in parts.norms for name in ("eps", "variance_epsilon", "normalized_shape")
        ]
        settings += [(dropout.__dict__, "p") for dropout in parts.dropouts]
        # Functions of a class that an object may hide: feed_forward_chunk and the like.
        settings += [(part.__dict__, name) for part in parts.containers for name in _functions(type(part))]
        self.snapshot = Snapshot(every.values(), settings, is_capture)
        tables = [module._parameters for module in (*parts.linears, *parts.norms) if not _is_adapter(module)]
        self._adapters = frozenset(filter(_is_adapter, parts.linears))
        self.places = [(table, name) for table in tables for name in ("weight", "bias") if name in table]
        self.is_still = Seen([self]).is_still

    def __call__(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: None = None,
        relative_bias: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        return encoder.run([self.weights(rotary)], x, cu_seqlens, max_seqlen, relative_bias=relative_bias)[0]

    @property
    def drops_inside(self) -> bool:
        """Whether it drops elements now where no op does."""
        return rate(self.parts.inner_dropout) > 0

    def weights(self, rotary: Rotary | None = None) -> encoder.LayerWeights:
        """What the layer computes with now; ``rotary``: the angles of positions, by types of layers."""
        parts = self.parts
        tensors: list[encoder.Weight | None] = []
        for linears in (parts.qkv, (parts.project,), parts.attention_norm, parts.widen, (parts.narrow,)):
            tensors += self._joined(linears) if isinstance(linears, tuple) else _norm_tensors(linears)
        tensors += _norm_tensors(parts.output_norm)
        first = parts.output_norm if parts.attention_norm is None else parts.attention_norm
        options = encoder.LayerOptions(
            parts.heads,
            self._activation,
            (_eps(first), _eps(parts.output_norm)),
            self.weight_dtype,
            dropout_p=(parts.attention_p(), rate(parts.project_dropout), rate(parts.output_dropout)),
            by_ops=bool(self._adapters),
            is_pre_norm=parts.is_pre_norm,
            norm=parts.norm,
            is_gated=parts.is_gated,
            num_kv_heads=parts.kv_heads if parts.kv_heads != parts.heads else None,
            window=parts.window,
        )
        angles = None if rotary is None or parts.rotary is None else rotary[parts.rotary]
        return encoder.LayerWeights(tuple(tensors), options, rotary=angles)

    def lay_out(self) -> list[Tensor]:
        """Gives weights that one product reads one memory; returns tensors of the memory they had."""
        found = []
        for linears in (self.parts.qkv, self.parts.widen):
            if len(linears) == 1 or not self._adapters.isdisjoint(linears):
                continue
            for name in ("weight", "bias"):
                parts = [linear._parameters[name] for linear in linears]
                if parts[0] is not None:
                    found += side_by_side.lay(parts)
        return found

    def _joined(self, linears: tuple[nn.Linear, ...]) -> tuple[encoder.Weight, Tensor | None]:
        """Weight and bias of one product for linear layers of the same input."""
        if not self._adapters.isdisjoint(linears):
            if len(linears) == 1:
                return linears[0], None
            return lambda x: torch.cat([tools.linear(x, linear) for linear in linears], dim=-1), None
        tables = [linear._parameters for linear in linears]
        count, has_bias = len(linears), tables[0]["bias"] is not None
        if count == 1:
            return tables[0]["weight"], tables[0]["bias"]
        sources = [table["weight"] for table in tables]
        if has_bias:
            sources += [table["bias"] for table in tables]

        def join() -> tuple[Tensor, Tensor | None]:
            return torch.cat(sources[:count]), torch.cat(sources[count:]) if has_bias else None

        is_trained = torch.is_grad_enabled() and any([source.requires_grad for source in sources])
        is_once = ("*", "reference") in choice.requested()
        if is_trained or is_once:
            return join()
        # On a GPU nothing tells the host, without waiting, that weights are still what they were: no copy is kept.
        if _is_on_gpu(sources[0]):
            weight = side_by_side.joined(sources[:count])
            bias = side_by_side.joined(sources[count:]) if has_bias else None
            return join() if weight is None or (has_bias and bias is None) else (weight, bias)
        return _fused.get(sources, "joined", join)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


class Layers:
    """The layers of one encoder as they were examined last. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[nn.Module, Layer]] = {}
        self._watched = identity.Watched()
        self._kinds: set[type] = set()
        self._configs: list[tuple[dict[str, Any], Any]] = []  # each attention's attributes, and its config
        # For each config: an attention, the name of what it calls, and that.
        self._functions: list[tuple[nn.Module, str | None, Any]] = []
        # Where all were examined: their stack, what was found, how they were, and how what is around them was.
        self._all: tuple[Stack, list[Layer], Seen, Snapshot] | None = None

    def __reduce__(self) -> tuple:
        return Layers, ()

    def __deepcopy__(self, memo: dict) -> Layers:
        return Layers()

    def examined(self, stack: Stack, kind: Kind) -> list[Layer | None]:
        """Each layer as it is now; None for one that must be called itself, and for all where something around them
        must be."""
        is_crowded = len(self._known) > 2 * len(stack.layers)  # layers that were replaced are not kept for ever
        if is_crowded or not self._is_attention_still() or not self._watched.are_still():
            self.__init__()
        if self._all is not None:
            known, found, seen, around = self._all
            if known == stack and seen.is_still() and around.is_still():
                return found
        self._all = None
        outside = [*stack.between, *(each for each in (stack.entry, stack.exit, stack.buckets) if each is not None)]
        around = Snapshot(outside, (), is_capture)
        if outside and (around.is_watched() or odd_around(stack, kind) is not None):
            return [None] * len(stack.layers)
        for module in outside:
            self._watch(type(module))
        found = [self._one(layer, kind) for layer in stack.layers]
        self._all = None if None in found else (stack, found, Seen(list(dict.fromkeys(found))), around)
        return found

    def are_still(self, stack: Stack) -> bool:
        """Whether all that ``examined`` looks at outside of the layers is as it was when it found them right."""
        known = self._all is not None and self._all[0] == stack and self._all[3].is_still()
        return known and self._is_attention_still() and self._watched.are_still()

    def lay_out(self, stack: Stack, kind: Kind) -> None:
        """Gives query, key and value of each layer one memory, so that their product is one without a copy."""
        before = [each for layer in self.examined(stack, kind) if layer is not None for each in layer.lay_out()]
        if before and before[0].is_cuda:
            torch.cuda.synchronize(before[0].device)  # other streams may be reading where the weights were

    def attention(self) -> Any | None:
        """The attention function of all layers that were examined; None if they differ in it."""
        function = self._functions[0][2]
        return function if all([other is function for _, _, other in self._functions]) else None

    def _is_attention_still(self) -> bool:
        if not all([own.get("config") is config for own, config in self._configs]):
            return False
        for own, name, function in self._functions:
            if implementation(own, self._kind) != name or attention_function(own, self._kind) is not function:
                return False
        return True

    def _one(self, layer: nn.Module, kind: Kind) -> Layer | None:
        known = self._known.get(id(layer))
        if known is not None and known[0] is layer:
            if known[1].is_still():
                return known[1]
            if known[1].snapshot.is_watched():
                return None
        found = examine(layer, kind) if type(layer).__name__ == kind.layer else ""
        if isinstance(found, str):
            self._known.pop(id(layer), None)
            return None
        self._remember(layer, found)
        return found if found.is_still() else None

    def _remember(self, layer: nn.Module, found: Layer) -> None:
        self._known[id(layer)] = (layer, found)
        self._kind = found.kind
        own = found.parts.attention
        config = own.__dict__.get("config")
        if not any(other is config for _, other in self._configs):
            function = attention_function(own, self._kind)
            self._functions.append((own, implementation(own, self._kind), function))
            self._watched.add_names_of(function)
        if not any(attributes is own.__dict__ for attributes, _ in self._configs):
            self._configs.append((own.__dict__, config))
        for module in found.parts.every:
            self._watch(type(module))

    def _watch(self, kind: type) -> None:
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._watched.add(kind)
