# SPDX-License-Identifier: Apache-2.0
"""Modules of AllenNLP's ELMo and its stacked biLSTM made faster in place, for ``ctxfast.swap_in``.

AllenNLP is archived, and its classes live on as copies in other people's code, so they are known by their name and
parts, not by where they are defined. Before a module is swapped its own forward and the new one run once on a small
input: only where both agree is it swapped. So a copy that was changed stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..nn.char_cnn import encode_words
from ..nn.elmo_lstm import run_layer, run_layers
from ..nn.highway import highways
from ..nn.watched import is_watched
from ..nn.words import encode_sentences
from . import identity


def _cells(module: nn.Module, layer: int) -> tuple[nn.Module, nn.Module]:
    return getattr(module, f"forward_layer_{layer}"), getattr(module, f"backward_layer_{layer}")


class _Swapped:
    """What swapped modules share. The first base of their classes; the second is the original."""

    impl: str | None = None
    weight_dtype: torch.dtype | None = None
    _original: type

    def _runs(self, *inputs: Any) -> bool:
        """Whether this call is computed here: nothing inside has changed since the results were last compared."""
        if torch.compiler.is_compiling():
            return True
        state = self.__dict__.get(_STATE)
        if state is None or not state.inside.is_still():
            if state is not None and state.inside.is_watched:
                return False
            state = self.__dict__[_STATE] = State(self)
        return state.is_same and not state.inside.is_watched and identity.is_ordinary(*inputs)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in its place: the original over the same parts."""
        original = self._original
        plain = original.__new__(original)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in OWN_NAMES})
        return plain


_STATE = "_ctxfast_state"
# In the __dict__ of a swapped module, and not in that of an original.
OWN_NAMES = ("_ctxfast_original", "impl", "weight_dtype", _STATE)


class State:
    """What stood inside a module when both ways of computing it were compared, and whether they agreed.

    Copies and pickles of it are empty: the copy is compared anew at its first call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.is_same = objection(module, module._original) is None
        self.inside = identity.Inside(module)

    def __reduce__(self) -> tuple:
        return _nothing, ()

    def __deepcopy__(self, memo: dict) -> None:
        return None


def _nothing() -> None:
    return None


class SwappedElmoLstm(_Swapped):
    """AllenNLP's ElmoLstm by ``ctxfast.lstm``: both directions of a layer at once, the state carried as there."""

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """(B, T, I) and (B, T) bool -> (L, B, T, 2P), as the original."""
        if not isinstance(self, _Swapped):  # restored, and somebody kept this function
            return type(self).forward(self, inputs, mask)
        first = self.forward_layer_0
        if not self._runs(inputs, mask) or (self.training and first.recurrent_dropout_probability > 0):
            return super().forward(inputs, mask)
        options = dict(
            cell_clip=first.memory_cell_clip_value or None,
            proj_clip=first.state_projection_clip_value or None,
            weight_dtype=self.weight_dtype,
            impl=self.impl,
        )
        layers = [partial(run_layer, _cells(self, layer), **options) for layer in range(self.num_layers)]
        batch = inputs.shape[0]
        outputs, (h, c) = run_layers(layers, inputs, mask.long().sum(1), self._started(batch))
        self._keep(batch, h, c)
        return torch.stack(outputs)

    def _started(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """The states of the first ``batch`` rows as (L, 2, B, size); zeros for rows that are new."""
        if self._states is None:
            return None
        result = []
        for state in self._states:  # (L, rows, 2 * size)
            missing = batch - state.shape[1]
            if missing > 0:
                state = torch.cat([state, state.new_zeros(state.shape[0], missing, state.shape[2])], 1)
            result.append(state[:, :batch].unflatten(2, (2, -1)).transpose(1, 2))
        return tuple(result)

    def _keep(self, batch: int, h: Tensor, c: Tensor) -> None:
        """Carry the final states on, in AllenNLP's layout; rows beyond this batch keep theirs."""
        final = [state.detach().transpose(1, 2).flatten(2) for state in (h, c)]
        if self._states is not None:
            final = [torch.cat([new, old[:, batch:]], 1) for new, old in zip(final, self._states)]
        self._states = tuple(final)


class SwappedElmoCharacterEncoder(_Swapped):
    """AllenNLP's _ElmoCharacterEncoder over the distinct words of a batch, without a loop over sentences."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """(B, T, 50) -> ``token_embedding`` (B, T + 2, P) and ``mask`` (B, T + 2) bool, as the original."""
        if not isinstance(self, _Swapped):
            return type(self).forward(self, inputs)
        if not self._runs(inputs):
            return super().forward(inputs)
        marks = (self._beginning_of_sentence_characters, self._end_of_sentence_characters)
        return encode_sentences(inputs, (inputs > 0).any(dim=-1), *(row.to(inputs) for row in marks), self._encode)

    def _encode(self, words: Tensor) -> Tensor:
        return encode_words(
            words,
            self._char_embedding_weights,
            [getattr(self, f"char_conv_{i}") for i in range(len(self._convolutions))],
            partial(highways, layers=self._highways._layers, impl=self.impl),
            self._projection,
            activation=self._options["char_cnn"]["activation"],
            impl=self.impl,
        )


class SwappedStackedBidirectionalLstm(_Swapped):
    """AllenNLP's StackedBidirectionalLstm without highways by ``ctxfast.lstm``."""

    def forward(
        self, inputs: PackedSequence, initial_state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        """Packed (B, T, I) -> packed (B, T, 2H) and the final states (2L, B, H), as the original."""
        if not isinstance(self, _Swapped):
            return type(self).forward(self, inputs, initial_state)
        dropped = self.training and self.forward_layer_0.recurrent_dropout_probability > 0
        if initial_state is not None or dropped or not self._runs(inputs.data):
            return super().forward(inputs, initial_state)
        x, lengths = pad_packed_sequence(inputs, batch_first=True)
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            cells = tuple(getattr(side, "cell", side) for side in _cells(self, layer))
            options = dict(weight_dtype=self.weight_dtype, impl=self.impl)
            x, (h, c) = run_layer(cells, x, lengths.to(x.device), None, **options)
            if layer < self.num_layers - 1:
                x = self.layer_dropout(x)
            h_n.append(h)
            c_n.append(c)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return packed, (torch.cat(h_n), torch.cat(c_n))


def _generator() -> torch.Generator:
    """Numbers of its own: nobody else's draws change."""
    return torch.Generator().manual_seed(0)


def _drawn(weight: Tensor) -> Tensor:
    return torch.randn(2, 3, weight.shape[1], generator=_generator(), device="cpu").to(weight)


def _elmo_lstm_inputs(module: nn.Module) -> tuple[Any, ...]:
    weight = module.forward_layer_0.input_linearity.weight
    mask = torch.tensor([[True, True, True], [True, False, False]], device=weight.device)
    return _drawn(weight) * mask[:, :, None], mask


def _character_inputs(module: nn.Module) -> tuple[Any, ...]:
    width = module._options["char_cnn"]["max_characters_per_token"]
    ids = torch.randint(1, module._char_embedding_weights.shape[0], (2, 3, width), generator=_generator(), device="cpu")
    ids[1, 2] = 0
    return (ids.to(module._char_embedding_weights.device),)


def _stacked_inputs(module: nn.Module) -> tuple[Any, ...]:
    cell = getattr(module.forward_layer_0, "cell", module.forward_layer_0)
    weight = cell.input_linearity.weight
    return (pack_padded_sequence(_drawn(weight), [3, 2], batch_first=True),)


# Class's name -> what its module is given, and a small input for it.
KINDS: dict[str, tuple[type, Callable[[nn.Module], tuple[Any, ...]]]] = {
    "ElmoLstm": (SwappedElmoLstm, _elmo_lstm_inputs),
    "_ElmoCharacterEncoder": (SwappedElmoCharacterEncoder, _character_inputs),
    "StackedBidirectionalLstm": (SwappedStackedBidirectionalLstm, _stacked_inputs),
}
_made: dict[type, type] = {}


def is_known(kind: type) -> bool:
    """Whether a class has the name of one of AllenNLP's, and is none of ours."""
    return kind.__name__ in KINDS and not kind.__module__.startswith("ctxfast.")


def swapped_class(original: type) -> type:
    """The class that modules of this class are given."""
    if original not in _made:
        own, _ = KINDS[original.__name__]
        values = {"__reduce_ex__": _reduce, "__module__": __name__, "_original": original}
        _made.setdefault(original, type(original.__name__, (own, original), values))
    return _made[original]


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    # Made classes have no name to be found under again: copies and pickles name the original.
    return _blank, (module._original,), module.__dict__


def _blank(original: type) -> nn.Module:
    made = swapped_class(original)
    return made.__new__(made)


# Settings that every cell of a stack has of its own, and that the fused layers take from the first.
_SHARED = ("memory_cell_clip_value", "state_projection_clip_value", "recurrent_dropout_probability", "use_highway")


def _odd(module: nn.Module, name: str) -> str | None:
    """Why a module stays as it is, by what it holds."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta:
            return "its parameters are on the meta device; load them first."
        if type(tensor) not in identity.PLAIN:
            return f"a weight is a {type(tensor).__name__}, a kind of tensor of its own (quantised or distributed)."
        if tensor.layout is not torch.strided:
            return f"a weight is a tensor of layout {tensor.layout}."
    if not all(tensor.is_floating_point() for tensor in module.parameters()):
        return "its parameters are no floating-point numbers."
    if "Lstm" in name:
        every = [cell for layer in range(module.num_layers) for cell in _cells(module, layer)]
        for setting in _SHARED:
            values = [getattr(cell, setting, None) for cell in every]
            if any(value != values[0] for value in values):
                return f"its layers differ in {setting}."
    if name == "StackedBidirectionalLstm" and getattr(module.forward_layer_0, "use_highway", False):
        return "its layers have highway connections inside the recurrence, which ctxfast.lstm does not."
    return identity.torch_objection()


def objection(module: nn.Module, kind: type | None = None) -> str | None:
    """Why a module, of this class or one made of it, stays as it is; None if its results stay the same."""
    kind = type(module) if kind is None else kind
    name = kind.__name__
    try:
        reason = _odd(module, name)
        if reason is not None:
            return reason
        # Hooks inside would see this input; such modules run as before anyway while they have them.
        if any(is_watched(part) for part in module.modules() if part is not module):
            return None
        with _undisturbed(module):
            inputs = KINDS[name][1](module)
            # Twice: the second call starts from the states that the first one left.
            expected = [out for _ in range(2) for out in _tensors(kind.forward(module, *inputs))]
        with _undisturbed(module):
            other = _as_swapped(module, kind)
            found = [out for _ in range(2) for out in _tensors(type(other).forward(other, *inputs))]
    except Exception as error:  # whatever somebody's forward raises
        return f"it is not built as AllenNLP's {name} is ({type(error).__name__}: {error})."
    if len(found) != len(expected):
        return f"its forward does not give what AllenNLP's {name} gives."
    for one, other in zip(found, expected):
        bound = 100 * torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0
        if one.shape != other.shape or not torch.allclose(one.double(), other.double(), rtol=bound, atol=bound):
            return f"its results differ from those of AllenNLP's {name}: it was changed."
    return None


class _Compared(State):
    """The state of the copy that is being compared: it takes every call."""

    def __init__(self, module: nn.Module) -> None:
        self.is_same, self.inside = True, identity.Inside(module)


def _as_swapped(module: nn.Module, kind: type) -> nn.Module:
    """Another module over the same parts, of the swapped class."""
    other = _blank(kind)
    other.__dict__.update(module.__dict__)
    other.__dict__["weight_dtype"] = None  # rounding is no difference that was asked about
    other.__dict__[_STATE] = _Compared(other)
    return other


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """As ``identity.undisturbed``, from states that are zeros; afterwards the states are as before."""
    states = module.__dict__.get("_states")
    if "_states" in module.__dict__:
        module._states = None
    try:
        with identity.undisturbed(module):
            yield
    finally:
        if "_states" in module.__dict__:
            module._states = states


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from _tensors(value[name])
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
