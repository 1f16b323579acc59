# SPDX-License-Identifier: Apache-2.0
"""What is wanted of a model: which layers, of tokens or of whole texts, pooled how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEVELS = ("token", "sentence")
POOLINGS = ("mean", "cls")
UNITS = ("text", "words", "pairs")
WORD_PIECES = ("first", "mean", "all")

Layers = str | int | Sequence[int]


@dataclass(frozen=True)
class Selection:
    """What to take from a model; make one with ``select``.

    Attributes:
        layers: layers to read, counted from the token (embedding) layer, which is 0.
        is_average: one layer, the plain mean of those.
        is_single: whether results have no axis for layers.
        level: "token" (a vector a token) or "sentence" (one a text).
        pooling: at sentence level, "mean" over a text's tokens or the vector of the first ("cls").
        normalize: scale every vector to length 1 (zeros stay zeros).
        unit: what a text is: "text" that the model splits, "words" split already, or "pairs" of texts whose special
            tokens are wanted, too.
        word_pieces: of a word that becomes several tokens: the "first", their "mean", or "all" of them.
    """

    layers: tuple[int, ...]
    is_average: bool
    is_single: bool
    level: str
    pooling: str
    normalize: bool
    unit: str
    word_pieces: str

    @property
    def depth(self) -> int:
        """Length of the axis of layers, before it is dropped."""
        return 1 if self.is_average else len(self.layers)


def parse_layers(text: str) -> Layers:
    """The layers of a command line: "all", "top", "average", or numbers with commas."""
    if text in ("all", "top", "average"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise _layers_error(text) from None


def _layers_error(got: object) -> ValueError:
    return ValueError(
        f"ctxfast.embed: layers is {got!r}; expected 'all', 'top', 'average', or numbers of layers such as -1,-2: 0 is "
        f"the token layer, -1 the top."
    )


def _choose(layers: Layers, num_layers: int) -> tuple[tuple[int, ...], bool, bool]:
    """Numbers of layers, whether they are averaged, and whether there is no axis for them."""
    everything = tuple(range(num_layers))
    named = {
        "all": (everything, False, False),
        "average": (everything, True, True),
        "top": ((num_layers - 1,), False, True),
    }
    if isinstance(layers, str):
        if layers not in named:
            raise _layers_error(layers)
        return named[layers]
    numbers = (layers,) if isinstance(layers, int) else tuple(layers)
    if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise _layers_error(layers)
    for number in numbers:
        if not -num_layers <= number < num_layers:
            raise ValueError(
                f"ctxfast.embed: layers holds {number}; expected numbers in {-num_layers}..{num_layers - 1}: the model "
                f"has {num_layers} layers, the token layer included."
            )
    chosen = tuple(number % num_layers for number in numbers)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"ctxfast.embed: layers is {list(numbers)}; expected every layer once.")
    return chosen, False, len(chosen) == 1


def select(
    kind: str,
    num_layers: int,
    *,
    layers: Layers = "top",
    level: str = "token",
    pooling: str = "mean",
    normalize: bool = False,
    unit: str = "text",
    word_pieces: str = "first",
) -> Selection:
    """Check a choice against a model.

    Args:
        kind: "bert" or "elmo".
        num_layers: layers of the model, the token layer included.
        layers: "all", "top", "average", a number or numbers; negative ones count from the top.
        level, pooling, normalize, unit, word_pieces: see ``Selection``.

    Raises:
        ValueError: an unknown word, a layer the model has not, or what the model cannot give.
    """
    for name, value, known in (
        ("level", level, LEVELS),
        ("pooling", pooling, POOLINGS),
        ("unit", unit, UNITS),
        ("word_pieces", word_pieces, WORD_PIECES),
    ):
        if value not in known:
            raise ValueError(f"ctxfast.embed: {name} is {value!r}; expected one of {', '.join(known)}.")
    if kind == "elmo":
        if pooling != "mean":
            raise ValueError(f"ctxfast.embed: pooling is {pooling!r}; expected 'mean': ELMo has no first token for it.")
        if unit == "pairs":
            raise ValueError("ctxfast.embed: format 'extract-features' was asked for; expected a BERT model for it.")
        unit, word_pieces = "words", "first"
    chosen, is_average, is_single = _choose(layers, num_layers)
    return Selection(chosen, is_average, is_single, level, pooling, normalize, unit, word_pieces)
