# SPDX-License-Identifier: Apache-2.0
"""One face for BERT and ELMo: lines of text in, the vectors that were asked for out.

An encoder prepares texts (tokens, lengths) and encodes batches of prepared texts. Layers are chosen, tokens pooled and
special tokens dropped on the device, so that only what was asked for is copied from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .._core import transfer
from ..models.bert.modeling import Bert
from ..models.bert.sentence_modules import SentenceModel
from ..models.bert.tokenization import BertTokenizer, Encoding
from ..models.elmo.bilm import ElmoBiLm
from ..models.elmo.tokenization import batch_to_ids
from .pooling import Merged, Pooler, spans, sums
from .selection import Selection
from .transformers_model import TransformersModel
from .windows import Windows, cut

# How Google's feature extraction writes a pair of texts on one line.
_PAIR = re.compile(r"^(.*) \|\|\| (.*)$")
_SURROGATE = re.compile("[\udc80-\udcff]")

Where = Callable[[int], str]


@dataclass(slots=True)
class Prepared:
    """A text ready to be encoded.

    Attributes:
        length: tokens the model sees, special ones included: what a batch is measured by.
        rows: vectors that come out of it.
        data: what the encoder needs of it.
        places: for words: where their vectors come from.
        words: for words: these, as far as they have rows.
        cut: tokens lost because the text was too long.
        windows: of a text that is too long and was not cut: its pieces.
    """

    length: int
    rows: int
    data: Any
    places: Any = None
    words: Any = None
    cut: int = 0
    windows: Windows | None = None


class TextEncoder(Protocol):
    """What ``Embedder`` needs of a model.

    Attributes:
        kind: "bert", "elmo".
        num_layers: layers that can be chosen, the token layer counted as the first.
        dim: size of a token's vector.
        sentence: what the model's folder says of vectors of texts; may be left out.
        is_padded: whether padding costs time, so that batches are measured with it.
        device: where it runs.
        files: files the results depend on.
        ops: names of the ops it runs, among which ``impl`` chooses; may be left out.
        dtype: what it computes in, by name ("float32", "int8", ...); may be left out.
    """

    kind: str
    num_layers: int
    dim: int
    is_padded: bool
    device: torch.device
    files: tuple[Path, ...]

    def read_lines(self, lines: Sequence[bytes], selection: Selection) -> tuple[list[Any], int]:
        """Lines of a file as ``prepare`` takes them, and how many bytes of them were not UTF-8 and were replaced."""
        ...

    def prepare(self, texts: Sequence[Any], selection: Selection, where: Where, truncate: bool) -> list[Prepared]:
        """Tokenise texts; ``where(i)`` names text i in an error."""
        ...

    def encode(self, batch: Sequence[Prepared], selection: Selection) -> Tensor:
        """(rows of the whole batch, layers, dim), floating point, on ``device``, still being computed perhaps."""
        ...

    def tokens(self, item: Prepared, selection: Selection) -> list[str]:
        """The tokens of a text, one for each of its rows at token level."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What is carried from batch to batch; {} where nothing is."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state_dict``; {} starts anew."""
        ...


def assemble(states: Sequence[Tensor], index: Tensor | None, lengths: Tensor | None, selection: Selection) -> Tensor:
    """Rows of the chosen layers.

    Args:
        states: the chosen layers, (M, N) each; all layers with ``selection.is_average``.
        index: (R,) rows to take; None for all rows.
        lengths: (S,) numbers of successive rows to take the mean of (zeros for the mean of none); None for the rows
            themselves.

    Returns:
        (R or S, layers, N) float32.
    """

    def rows(state: Tensor) -> Tensor:
        if index is not None:
            state = state.index_select(0, index)
        state = state.float()
        return state if lengths is None else sums(state, lengths) / lengths.clamp(min=1)[:, None]

    return _scaled(_stacked(map(rows, states), selection), selection)


def _stacked(parts: Iterable[Tensor], selection: Selection) -> Tensor:
    """(S, N) of every layer to (S, layers, N), or their mean to (S, 1, N)."""
    if not selection.is_average:
        return torch.stack(list(parts), 1)
    total: Any = 0.0
    count = 0
    for part in parts:  # one at a time: all layers of a batch are large
        total, count = part + total, count + 1
    return (total / count)[:, None]


def _scaled(result: Tensor, selection: Selection) -> Tensor:
    return torch.nn.functional.normalize(result, dim=-1) if selection.normalize else result


def _computes_in(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> str:
    """What the products of a model are computed in, by name."""
    return str(weight_dtype or dtype).removeprefix("torch.")


def _pieces(item: Prepared) -> Sequence[Any]:
    """What the model is given of a text."""
    return [item.data] if item.windows is None else item.windows.pieces


def _rows(item: Prepared, places: np.ndarray, start: int) -> np.ndarray:
    """Rows of a text's tokens in a batch in which it begins at ``start``."""
    return start + (places if item.windows is None else item.windows.rows[places])


def _too_long(where: str, tokens: int, limit: int) -> ValueError:
    return ValueError(
        f"ctxfast.embed: {where} has {tokens} tokens, special ones included; expected at most {limit}, the most that "
        f"the model takes. Pass --split 64 (Embedder(split=64)) to embed them in windows that overlap by so many "
        f"tokens, or --truncate (truncate=True) to cut them."
    )


class BertEncoder:
    """A BERT-family model behind the face of ``TextEncoder``.

    Args:
        model: in eval mode, on its device; of a type that ``Bert`` does not compute a ``TransformersModel``.
        tokenizer: the model's.
        files: files both were read from.
        sentence: what the model's folder says of vectors of texts; None for nothing.
        split: tokens by which windows of texts that are too long overlap; None to refuse such texts, or cut them.
    """

    kind = "bert"
    is_padded = False
    ops = Bert.ops

    def __init__(
        self,
        model: Bert | TransformersModel,
        tokenizer: BertTokenizer,
        files: Sequence[Path] = (),
        sentence: SentenceModel | None = None,
        split: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.files = model.eval(), tokenizer, tuple(files)
        self.num_layers = model.config.num_hidden_layers + 1
        self.dim = model.config.hidden_size
        self.device, self.dtype = model.device, _computes_in(model.dtype, model.weight_dtype)
        self.sentence = sentence or SentenceModel(self.dim, max_length=tokenizer.max_length)
        self._steps = [step.to(self.device) for step in self.sentence.steps]
        self._limits = {"token": tokenizer.max_length, "sentence": self.sentence.max_length}
        # The limit of a call is one of those two; the tokenizer's own is what the model has positions for.
        limits = [limit for limit in self._limits.values() if limit is not None]
        tokenizer.max_length = max(limits, default=None) if split is None else None  # texts to be split are whole
        if tokenizer.pad_token_id >= model.config.vocab_size:
            raise ValueError(
                f"ctxfast.Embedder: the padding token of {tokenizer.source} has the id {tokenizer.pad_token_id}; "
                f"expected one below {model.config.vocab_size}, the rows of the model's word table."
            )
        least = tokenizer.backend.num_special_tokens_to_add(True) + 1
        if self.sentence.max_length is not None and self.sentence.max_length < least:
            raise ValueError(
                f"ctxfast.Embedder: max_seq_length of the model with {tokenizer.source} is {self.sentence.max_length}; "
                f"expected at least {least}, special tokens included."
            )
        special = tokenizer.encode("a", truncation=True).special_tokens_mask
        if 0 not in special:
            raise ValueError(f"ctxfast.Embedder: {tokenizer.source} makes no token of the text 'a'; expected one.")
        self._before = special.index(0)
        self._after = special[::-1].index(0)
        self._special_ids = np.array(sorted(tokenizer.special_ids))
        self._split = split
        if split is not None and limits:
            self._check_overlap(min(limits), self._before)

    def _check_overlap(self, limit: int, before: int) -> None:
        """Raise ValueError where windows of this many tokens could not go on."""
        room = limit - before - self._after
        if self._split is not None and self._split >= room:
            raise ValueError(
                f"ctxfast.Embedder: split is {self._split}; expected at most {room - 1}: of the {limit} tokens of a "
                f"window {room} are the text's, and fewer of them overlap."
            )

    def read_lines(self, lines: Sequence[bytes], selection: Selection) -> tuple[list[Any], int]:
        replaced = 0
        texts: list[Any] = []
        for line in lines:
            try:
                text = line.decode()
            except UnicodeDecodeError:
                text = line.decode("utf-8", "replace")
                replaced += text.count("\ufffd") - line.count("\ufffd".encode())
            texts.append(text)
        if selection.unit == "words":
            return [text.split() for text in texts], replaced
        if selection.unit == "pairs":
            found = [_PAIR.match(text.strip()) for text in texts]
            return [pair.groups() if pair else text.strip() for pair, text in zip(found, texts)], replaced
        return texts, replaced

    def prepare(self, texts: Sequence[Any], selection: Selection, where: Where, truncate: bool) -> list[Prepared]:
        limit = self._limits[selection.level]
        is_split = self._split is not None and limit is not None and selection.unit != "pairs"
        options = {} if is_split else {"max_length": limit, "truncation": True}
        if selection.unit == "words":
            encodings = self.tokenizer.encode_words_batch(texts, **options)
        else:
            if selection.prompt:
                texts = [selection.prompt + text for text in texts]
            encodings = self.tokenizer.encode_batch(texts, **options)
        before = self._in_every_window(selection) if is_split else 0
        result = []
        special = 0 if selection.unit == "pairs" else self._before + self._after
        for i, encoding in enumerate(encodings):
            length = len(encoding)
            if encoding.truncated and not truncate:
                raise _too_long(where(i), length + encoding.truncated, limit or length)
            if self.tokenizer.vocab_size > self.model.config.vocab_size:
                self._check_ids(encoding, where(i))
            item = Prepared(length, length - special, encoding, cut=encoding.truncated)
            if is_split and limit is not None and length > limit:
                item.windows = cut(encoding, before, self._after, limit, self._split or 0)
                item.length = sum(map(len, item.windows.pieces))
            if selection.level == "sentence":
                item.rows = 1
            elif selection.unit == "words":
                item.places = self._word_places(encoding, texts[i], selection)
                item.rows = len(item.places[-1])
                item.words = texts[i][: item.rows]
            result.append(item)
        return result

    def _check_ids(self, encoding: Encoding, where: str) -> None:
        limit = self.model.config.vocab_size
        for token, number in zip(encoding.tokens, encoding.ids):
            if number >= limit:
                raise ValueError(
                    f"ctxfast.embed: {where} has the token {token!r} of id {number}; expected ids below {limit}, the "
                    f"rows of the model's word table: {self.tokenizer.source} and the weights do not belong together."
                )

    def _prompt_length(self, selection: Selection) -> int:
        """Tokens at a text's beginning that are not pooled."""
        return 0 if selection.pools_prompt or not selection.prompt else self._tokens_of_prompt(selection.prompt)

    def _tokens_of_prompt(self, prompt: str) -> int:
        """How many they are, special ones before them included."""
        ids = self.tokenizer.encode(prompt, max_length=self._limits["sentence"], truncation=True).ids
        return len(ids) - int(np.isin(ids[-1], self._special_ids))

    def _in_every_window(self, selection: Selection) -> int:
        """Tokens at a text's beginning that every window of it begins with."""
        before = self._before if not selection.prompt else self._tokens_of_prompt(selection.prompt)
        limit = self._limits[selection.level]
        if limit is not None:
            self._check_overlap(limit, before)
        return before

    @staticmethod
    def _word_places(encoding: Encoding, words: Sequence[str], selection: Selection) -> tuple[np.ndarray, ...]:
        """Positions of the tokens of words and, but for "all", how many of them belong to each word."""
        ids = np.array([-1 if number is None else number for number in encoding.word_ids], dtype=np.int64)
        positions = np.flatnonzero(ids >= 0)
        if selection.word_pieces == "all":
            return (positions,)
        of_word = ids[positions]
        # Of a text that was cut, words beyond the cut have no row.
        count = int(of_word.max(initial=-1)) + 1 if encoding.truncated else len(words)
        if selection.word_pieces == "first":
            positions = positions[np.unique(of_word, return_index=True)[1]]
            of_word = ids[positions]
        # A word that leaves no token (a control character) has a row of zeros: the mean of none.
        return positions, np.bincount(of_word, minlength=count)

    def _plan(self, batch: Sequence[Prepared], selection: Selection) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Rows to take of the packed tokens, and how many of them are one vector: see ``assemble``."""
        lengths = np.array([item.length for item in batch], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        if selection.unit == "pairs":
            return None, None
        if selection.unit == "text":
            if all(item.windows is None for item in batch):
                return spans(starts + self._before, lengths - (self._before + self._after)), None
            places = [np.arange(self._before, len(item.data) - self._after) for item in batch]
            return np.concatenate([_rows(*each) for each in zip(batch, places, starts)]), None
        index = np.concatenate([_rows(item, item.places[0], start) for item, start in zip(batch, starts)])
        if selection.word_pieces == "all":
            return index, None
        counts = np.concatenate([item.places[1] for item in batch])
        return index, None if (counts == 1).all() else counts

    @torch.inference_mode()
    def encode(self, batch: Sequence[Prepared], selection: Selection) -> Tensor:
        pieces = [piece for item in batch for piece in _pieces(item)]
        inputs = self.tokenizer.batch(pieces, device=self.device)
        top = self.num_layers - 1
        needs_all = selection.layers != (top,)
        found = self.model(**inputs, output_hidden_states=needs_all, return_packed=True)
        layers = found.packed_hidden_states
        states = [found.packed_last_hidden_state] if layers is None else [layers[k] for k in selection.layers]
        if selection.level == "sentence":
            return self._pooled(states, batch, selection)
        index, lengths = (
            None if part is None else transfer.to_device(part, self.device) for part in self._plan(batch, selection)
        )
        return assemble(states, index, lengths, selection)

    def _pooled(self, states: Sequence[Tensor], batch: Sequence[Prepared], selection: Selection) -> Tensor:
        """(texts, layers, dim) float32 of the chosen layers."""
        pieces = [_pieces(item) for item in batch]
        lengths = np.array([len(piece) for own in pieces for piece in own], dtype=np.int64)
        pooler = Pooler(lengths, self._prompt_length(selection), self.device)
        merge = Merged([len(own) for own in pieces], lengths, self.device)
        if selection.is_average and "max" in selection.pooling:  # the others may be averaged afterwards
            states = [torch.stack([state.float() for state in states]).mean(0)] * len(states)
        parts = (merge(torch.cat([pooler(state, mode) for mode in selection.pooling], dim=-1)) for state in states)
        result = _stacked(parts, selection)
        if selection.has_steps:
            # As rows of vectors: an activation may choose its axis by how many there are.
            rows = result.flatten(0, 1)
            for step in self._steps:
                rows = step(rows)
            result = rows.unflatten(0, result.shape[:2])
        return _scaled(result, selection)

    def tokens(self, item: Prepared, selection: Selection) -> list[str]:
        tokens = item.data.tokens
        if selection.unit == "pairs":
            return tokens
        if selection.unit == "text" or selection.level == "sentence":
            return tokens[self._before : len(tokens) - self._after]
        if selection.word_pieces == "all":
            return [tokens[position] for position in item.places[0]]
        return list(item.words)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        return


class ElmoEncoder:
    """An ELMo language model behind the face of ``TextEncoder``.

    Args:
        model: in eval mode, on its device.
        files: files it was read from.
    """

    kind = "elmo"
    is_padded = True
    ops = ElmoBiLm.ops

    def __init__(self, model: ElmoBiLm, files: Sequence[Path] = ()) -> None:
        self.model, self.files = model.eval(), tuple(files)
        self.num_layers, self.dim = model.num_layers, model.config.output_dim
        self.sentence = SentenceModel(self.dim)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, _computes_in(weight.dtype, model.weight_dtype)

    def read_lines(self, lines: Sequence[bytes], selection: Selection) -> tuple[list[Any], int]:
        # White space is Unicode's, as in AllenNLP; bytes that are not UTF-8 go to the model as they are.
        texts = []
        for line in lines:
            text = line.decode("utf-8", "surrogateescape")
            words = text.split()
            if _SURROGATE.search(text):
                words = [word.encode("utf-8", "surrogateescape") for word in words]
            texts.append(words)
        return texts, 0

    def prepare(self, texts: Sequence[Any], selection: Selection, where: Where, truncate: bool) -> list[Prepared]:
        result = []
        for text in texts:
            words = text.split() if isinstance(text, str) else list(text)
            result.append(Prepared(len(words) + 2, 1 if selection.level == "sentence" else len(words), words))
        return result

    @torch.inference_mode()
    def encode(self, batch: Sequence[Prepared], selection: Selection) -> Tensor:
        ids = batch_to_ids([item.data for item in batch], max_characters=self.model.config.max_characters)
        layers = self.model(transfer.to_device(ids, self.device))["activations"]
        counts = np.array([len(item.data) for item in batch], dtype=np.int64)
        # The row before a sentence's first word is the mark of its beginning.
        starts = np.arange(len(batch)) * layers[0].shape[1] + 1
        index = transfer.to_device(spans(starts, counts), self.device)
        lengths = transfer.to_device(counts, self.device) if selection.level == "sentence" else None
        return assemble([layers[k].flatten(0, 1) for k in selection.layers], index, lengths, selection)

    def tokens(self, item: Prepared, selection: Selection) -> list[str]:
        return [word.decode("utf-8", "replace") if isinstance(word, bytes) else word for word in item.data]

    def state_dict(self) -> dict[str, Tensor]:
        carried = self.model.carried_state
        return {} if carried is None else dict(zip("hc", carried))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.carried_state = (state["h"], state["c"]) if state else None
