# SPDX-License-Identifier: Apache-2.0
"""How a kind of encoders of Hugging Face's Transformers is described: its layers, and where each part of one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


@dataclass(frozen=True)
class Parts:
    """The modules of one layer, whatever its names for them, and what else its arithmetic needs.

    Attributes:
        qkv: the products for query, key and value; or one for all three.
        attention_norm: None where a pre-norm layer has none.
        widen: the feed-forward block's first product; or, gated, that of the half that is activated and the other's.
        attention: holds the config, and the settings of attention.
        heads, kv_heads: of queries; of keys and values, None for as many.
        attention_dropout: the module, if there is one.
        attention_p: the probability of dropping an attention weight, as modules are now.
        containers: the layer and the modules between it and these, which may have hooks too.
        inner_dropout: before the feed-forward block's last product; where it drops, calls run as before.
        settings: (table, name) of values that must stay what they are.
        others: modules that do nothing.
        is_pre_norm, norm, is_gated, window: as in ``nn.encoder.LayerOptions``.
        rotary: the type of layers, by which a model of several finds the angles of their positions; "" if all are of
            one; None without rotary positions.
    """

    qkv: tuple[nn.Linear, ...]
    project: nn.Linear
    attention_norm: Any
    widen: tuple[nn.Linear, ...]
    narrow: nn.Linear
    output_norm: Any
    activation: nn.Module
    attention: nn.Module
    heads: int
    attention_dropout: nn.Dropout | None
    attention_p: Callable[[], float]
    project_dropout: nn.Dropout | None
    output_dropout: nn.Dropout | None
    containers: tuple[nn.Module, ...]
    kv_heads: int | None = None
    inner_dropout: nn.Dropout | None = None
    settings: tuple[tuple[dict[str, Any], str], ...] = ()
    others: tuple[nn.Module, ...] = ()
    is_pre_norm: bool = False
    norm: str = "layer"
    is_gated: bool = False
    window: int | None = None
    rotary: str | None = None

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return *self.qkv, self.project, *self.widen, self.narrow

    @property
    def norms(self) -> tuple[Any, ...]:
        return tuple(norm for norm in (self.attention_norm, self.output_norm) if norm is not None)

    @property
    def dropouts(self) -> tuple[nn.Dropout, ...]:
        every = (self.attention_dropout, self.project_dropout, self.output_dropout, self.inner_dropout)
        return tuple(dropout for dropout in every if dropout is not None)

    @property
    def every(self) -> tuple[nn.Module, ...]:
        return *self.containers, *self.linears, *self.norms, *self.dropouts, self.activation, *self.others


def rate(dropout: nn.Dropout | None, mode: nn.Module | None = None) -> float:
    """The probability that a dropout has now, in its own mode or in that of the module that hands it on."""
    return dropout.p if dropout is not None and (mode or dropout).training else 0.0


def setting(own: Any) -> float:
    """A probability that is a number of the attention's."""
    return own.attention_dropout if own.training else 0.0


class Stack(NamedTuple):
    """What one encoder runs.

    Attributes:
        layers: in the order in which they run; shared ones come as often as they run.
        entry: a product before the first layer.
        exit: a LayerNorm after the last.
        buckets: the embedding of relative positions whose bias every layer's attention adds to its scores.
        between: modules between the encoder and its layers, or beside these.
    """

    layers: list[nn.Module]
    entry: nn.Module | None = None
    between: tuple[nn.Module, ...] = ()
    exit: nn.Module | None = None
    buckets: nn.Module | None = None


def in_list(encoder: nn.Module, name: str = "layer", entry: str = "", exit: str = "", buckets: str = "") -> Stack | str:
    """Layers that stand in a list of this name; a sentence if they do not."""
    modules = encoder.__dict__["_modules"]
    layers = modules.get(name)
    if type(layers) is not nn.ModuleList:
        return f"its layers stand in a {type(layers).__name__}, not in a torch.nn.ModuleList."
    entry, exit, buckets = map(modules.get, (entry, exit, buckets))
    return Stack(list(layers._modules.values()), entry, exit=exit, buckets=buckets)


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of encoder.

    Attributes:
        modeling, name: its module and class in Transformers.
        containers: paths of the modules between a layer and its leaves, and the names of their classes; "" is the
            layer.
        parts: finds the parts of a layer.
        result: the class of what it returns.
        stack: finds the layers of an encoder, or says why not.
        between: the class of the modules between encoder and layers.
        arguments: names of its first arguments. The first is hidden states; of others than these and attention_mask
            none may be given.
        is_older: whether its attention computes its own scores, and the encoder itself collects hidden states.
        returns_dict: whether it returns a dictionary where ``return_dict`` is left out.
        collects: whether hidden states of all layers can be collected here.
        note: what to say of calls that run as before.
        is_model: whether it is a whole model, which embeds ids, runs its layers and may do more after them.
    """

    modeling: str
    name: str
    containers: dict[str, str]
    parts: Callable[[nn.Module], Parts]
    result: str = "BaseModelOutput"
    stack: Callable[[nn.Module], Stack | str] = in_list
    between: str = ""
    arguments: tuple[str, ...] = ("hidden_states", "attention_mask")
    is_older: bool = False
    returns_dict: bool = True
    collects: bool = True
    note: str | None = None
    is_model: bool = False

    @property
    def layer(self) -> str:
        return self.containers[""]

    @property
    def has_cache(self) -> bool:
        """Whether it hands on a cache where one is asked for."""
        return self.result == MANY_OUTPUTS

    @property
    def full_name(self) -> str:
        return f"{self.modeling}.{self.name}"


MANY_OUTPUTS = "BaseModelOutputWithPastAndCrossAttentions"
