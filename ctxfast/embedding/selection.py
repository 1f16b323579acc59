# SPDX-License-Identifier: Apache-2.0
"""What is wanted of a model: which layers, of tokens or of whole texts, pooled how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.bert.sentence_modules import POOLINGS, SentenceModel

LEVELS = ("token", "sentence")
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
        dim: size of a vector.
        pooling: at sentence level, how a text's tokens become one vector: names of ``POOLINGS``, whose parts stand one
            after another.
        has_steps: at sentence level, whether the modules follow that the model has after pooling.
        normalize: scale every vector to length 1 (zeros stay zeros).
        prompt: what is written before every text.
        pools_prompt: whether the prompt's tokens are pooled, too.
        unit: what a text is: "text" that the model splits, "words" split already, or "pairs" of texts whose special
            tokens are wanted, too.
        word_pieces: of a word that becomes several tokens: the "first", their "mean", or "all" of them.
    """

    layers: tuple[int, ...]
    is_average: bool
    is_single: bool
    level: str
    dim: int
    pooling: tuple[str, ...]
    has_steps: bool
    normalize: bool
    prompt: str
    pools_prompt: bool
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
    sentence: SentenceModel,
    dim: int,
    *,
    layers: Layers = "top",
    level: str = "token",
    pooling: str | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    unit: str = "text",
    word_pieces: str | None = None,
) -> Selection:
    """Check a choice against a model.

    Args:
        kind: "bert" or "elmo".
        num_layers: layers of the model, the token layer included.
        sentence: what the model's folder says of vectors of texts.
        dim: size of a token's vector.
        layers: "all", "top", "average", a number or numbers; negative ones count from the top.
        level, unit: see ``Selection``.
        word_pieces: see ``Selection``; None is "first".
        pooling, normalize, prompt, prompt_name: see ``Embedder``; None is what ``sentence`` says.

    Raises:
        ValueError: an unknown word, a layer the model has not, what the model cannot give, or what does not apply.
        TypeError: a prompt that is not a string.
    """
    for name, value, known in (
        ("level", level, LEVELS),
        ("pooling", pooling, (None, *POOLINGS)),
        ("normalize", normalize, (None, True, False)),
        ("unit", unit, UNITS),
        ("word_pieces", word_pieces, (None, *WORD_PIECES)),
    ):
        if value not in known:
            raise ValueError(f"ctxfast.embed: {name} is {value!r}; expected one of {', '.join(map(str, known))}.")
    if pooling is not None and level == "token":
        raise ValueError(f"ctxfast.embed: pooling is {pooling!r} at token level; expected level 'sentence' for it.")
    if word_pieces is not None and (kind == "elmo" or level != "token" or unit != "words"):
        raise ValueError(
            f"ctxfast.embed: word_pieces is {word_pieces!r}; expected it for a BERT model at token level, with texts "
            f"that are lists of words (words=True, --tokens for a file)."
        )
    if kind == "elmo":
        if pooling not in (None, "mean"):
            raise ValueError(f"ctxfast.embed: pooling is {pooling!r}; expected 'mean': ELMo has no first token for it.")
        if unit == "pairs":
            raise ValueError("ctxfast.embed: format 'extract-features' was asked for; expected a BERT model for it.")
        unit = "words"
    chosen, is_average, is_single = _choose(layers, num_layers)
    text = _prompt(kind, sentence, level, unit, prompt, prompt_name)
    is_own = level == "sentence" and pooling is None
    if is_own and sentence.problem is not None:
        raise ValueError(sentence.problem)
    if normalize is None:
        normalize = level == "sentence" and sentence.is_normalized
    return Selection(
        layers=chosen,
        is_average=is_average,
        is_single=is_single,
        level=level,
        dim=sentence.dim if is_own else dim,
        pooling=sentence.pooling if is_own else (pooling or "mean",),
        has_steps=is_own and bool(sentence.steps),
        normalize=normalize,
        prompt=text,
        pools_prompt=sentence.include_prompt if is_own else True,
        unit=unit,
        word_pieces=word_pieces or "first",
    )


def _prompt(
    kind: str, sentence: SentenceModel, level: str, unit: str, prompt: str | None, prompt_name: str | None
) -> str:
    """What is written before texts: ``prompt``, else the one of that name, else at sentence level the model's own."""
    for name, value in (("prompt", prompt), ("prompt_name", prompt_name)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"ctxfast.embed: {name} is {value!r:.80}; expected a string.")
    if prompt is not None and prompt_name is not None:
        raise ValueError(f"ctxfast.embed: prompt is given beside prompt_name {prompt_name!r}; expected one of them.")
    if prompt_name is not None and prompt_name not in sentence.prompts:
        known = ", ".join(map(repr, sentence.prompts)) or "none"
        raise ValueError(f"ctxfast.embed: prompt_name is {prompt_name!r}; expected one that the model has: {known}.")
    if level != "sentence":
        if prompt or prompt_name:
            raise ValueError(
                "ctxfast.embed: a prompt is given at token level; expected level 'sentence' for it. Write it before "
                "the texts where its tokens are wanted."
            )
        return ""
    if prompt_name is not None:
        prompt = sentence.prompts[prompt_name]
    text = sentence.default_prompt if prompt is None else prompt
    if text and (unit != "text" or kind != "bert"):
        raise ValueError(
            f"ctxfast.embed: the prompt is {text!r} and texts are lists of words; expected strings to write it "
            f"before. Pass prompt='' for none."
        )
    return text
