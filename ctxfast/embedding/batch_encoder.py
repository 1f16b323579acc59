# SPDX-License-Identifier: Apache-2.0
"""``BatchEncoder``: a model with the settings it runs with, texts in, batches of vectors out. Calls of ``Embedder`` and
jobs over files share it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._core import transfer
from .._core.choice import use_impl, why_no_impl
from .._core.texts import described
from ..models.bert.sentence_modules import SentenceModel
from .encoders import Prepared, TextEncoder, Where
from .open_model import chosen_device, open_encoder
from .selection import Selection, select

STATES = ("steady", "zero", "carry")
DTYPES = ("float32", "float16", "bfloat16", "int8")
VECTOR_DTYPES = ("float32", "float16")
# Tokens of a batch: enough to fill the device; more only costs memory.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# The vectors of a batch, all layers asked for, stay below this: two batches are in memory at a time.
_BATCH_BYTES = 256 << 20
# AllenNLP's number of sentences in a batch: with carried states results depend on it.
_CARRY_BATCH = 64

_Path = str | os.PathLike[str]
_LOG = logging.getLogger(__name__)


class BatchEncoder:
    """A model and how it is run; arguments and attributes are those of ``Embedder``."""

    def __init__(
        self,
        model: _Path | TextEncoder | None = None,
        *,
        device: str | torch.device = "auto",
        impl: str | None = None,
        state: str | None = None,
        dtype: str | torch.dtype | None = None,
        vector_dtype: str | torch.dtype = "float32",
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        options_file: _Path | None = None,
        weight_file: _Path | None = None,
        download: bool = False,
        split: int | None = None,
    ) -> None:
        weights, vectors = _name_of(dtype), _name_of(vector_dtype)
        for name, value, known in (
            ("state", state, (None, *STATES)),
            ("dtype", weights, (None, *DTYPES)),
            ("vector_dtype", vectors, VECTOR_DTYPES),
        ):
            if value not in known:
                raise ValueError(
                    f"ctxfast.Embedder: {name} is {value!r}; expected one of {', '.join(map(str, known))}."
                )
        for name, number in (("batch_tokens", batch_tokens), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"ctxfast.Embedder: {name} is {number}; expected 1 or more.")
        if split is not None and (isinstance(split, bool) or not isinstance(split, int) or split < 0):
            raise ValueError(f"ctxfast.Embedder: split is {split!r}; expected a number of tokens, 0 or more, or None.")
        self.split = split
        self.impl, self.vector_dtype = impl, np.dtype("<f4" if vectors == "float32" else "<f2")
        self.state = state or "steady"
        with self._implementation():  # an unknown name is an error now, not at the first text
            pass
        if isinstance(model, (str, os.PathLike)) or model is None:
            model = open_encoder(
                model,
                chosen_device(device),
                weights,
                state=self.state,
                options_file=options_file,
                weight_file=weight_file,
                download=download,
                split=split,
            )
        else:
            _check_encoder(model, device, weights, split, options_file, weight_file)
        self.encoder: TextEncoder = model
        self.kind, self.num_layers, self.dim = model.kind, model.num_layers, model.dim
        self._sentence: SentenceModel = getattr(model, "sentence", None) or SentenceModel(model.dim)
        self.sentence_dim, self.prompts = self._sentence.dim, dict(self._sentence.prompts)
        if dtype is None and self.dtype not in (None, "float32"):
            _LOG.info(
                "ctxfast.Embedder computes in %s on %s; dtype='float32' is slower and exact",
                self.dtype,
                self.device,
            )
        self._has_said = False
        self._to_host = transfer.ToHost()
        if state is not None and self.kind != "elmo":
            raise ValueError(f"ctxfast.Embedder: state is {state!r}; expected an ELMo model for it, not {self.kind}.")
        if batch_size is not None and state != "carry":
            raise ValueError(
                f"ctxfast.Embedder: batch_size is {batch_size}; expected it with state 'carry' alone. Elsewhere a "
                f"batch has as many texts as batch_tokens allows."
            )
        if batch_tokens is not None and state == "carry":
            raise ValueError(
                f"ctxfast.Embedder: batch_tokens is {batch_tokens}; expected batch_size with state 'carry', where "
                f"results depend on the number of texts in a batch."
            )
        reason = why_no_impl(impl, model.device, getattr(model, "ops", None))
        if reason is not None:
            raise RuntimeError(f"ctxfast.Embedder: impl is {impl!r}, but {reason}")
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size or _CARRY_BATCH

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def torch_dtype(self) -> torch.dtype:
        """``vector_dtype`` in torch's words."""
        return torch.float32 if self.vector_dtype.itemsize == 4 else torch.float16

    @property
    def dtype(self) -> str | None:
        """What the model computes in; None where its encoder does not say."""
        return getattr(self.encoder, "dtype", None)

    def reset(self) -> None:
        """Forget carried states."""
        self.encoder.load_state_dict({})

    def _implementation(self) -> AbstractContextManager[None]:
        return use_impl(self.impl) if self.impl is not None else nullcontext()

    def select(self, **options: Any) -> Selection:
        """A ``Selection`` checked against this model."""
        selection = select(self.kind, self.num_layers, self._sentence, self.dim, **options)
        left_out = self._sentence.after_pooling or (self._sentence.problem and "modules that are not known here")
        if left_out and selection.level == "sentence" and options.get("pooling") is not None and not self._has_said:
            self._has_said = True
            warnings.warn(
                f"ctxfast.Embedder: pooling is {options['pooling']!r}, so that the encoder's own vectors are pooled. "
                f"Left out of the model's folder: {left_out}. Pass pooling=None to follow it.",
                stacklevel=3,
            )
        return selection

    def prepare(self, texts: Sequence[Any], selection: Selection, where: Where, truncate: bool) -> list[Prepared]:
        return self.encoder.prepare(texts, selection, where, truncate)

    def token_budget(self, selection: Selection) -> int:
        """Most tokens of a batch."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        usual = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cuda"])
        return max(min(usual, _BATCH_BYTES // (4 * selection.depth * max(selection.dim, self.dim))), 1)

    def _batches(self, items: Sequence[Prepared], selection: Selection) -> list[list[int]]:
        if self.state == "carry":
            return fixed_batches(len(items), self.batch_size)
        lengths = [item.length for item in items]
        return token_batches(lengths, self.token_budget(selection), is_padded=self.encoder.is_padded)

    def _encode(self, items: Sequence[Prepared], selection: Selection) -> Iterator[tuple[list[int], Tensor]]:
        """Batches on the device."""
        for batch in self._batches(items, selection):
            with self._implementation():
                values = self.encoder.encode([items[index] for index in batch], selection)
            yield batch, values.to(self.torch_dtype)

    def encode_on_device(self, items: Sequence[Prepared], selection: Selection) -> Iterator[tuple[list[int], Tensor]]:
        """As ``encode``, with tensors on the model's device."""
        sums = []
        for batch, values in self._encode(items, selection):
            sums.append(values.sum(dtype=torch.float32))
            yield batch, values
        if sums and self._may_overflow:
            self._check_finite(float(torch.stack(sums).sum()))

    def encode(self, items: Sequence[Prepared], selection: Selection) -> Iterator[tuple[list[int], np.ndarray]]:
        """Batches of texts: their indices, and (rows, layers, dim) of all of them one after another.

        While a batch is copied from a GPU the next one is computed.

        Raises:
            RuntimeError: vectors that hold infinity or NaN, of a model that computes in half precision.
        """
        waiting: list[tuple[list[int], transfer.Copy, transfer.Copy | None]] = []

        def finish() -> tuple[list[int], np.ndarray]:
            batch, values, total = waiting.pop(0)
            if total is not None:
                self._check_finite(float(total.finish()))
            return batch, values.finish()

        for batch, values in self._encode(items, selection):
            start = self._to_host.start
            # One number tells of all: a sum with NaN or infinity in it is not finite.
            total = start(values.sum(dtype=torch.float32)) if self._may_overflow else None
            waiting.append((batch, start(values), total))
            if len(waiting) > 1:
                yield finish()
        while waiting:
            yield finish()

    @property
    def _may_overflow(self) -> bool:
        return self.dtype == "float16" or self.vector_dtype.itemsize == 2

    def _check_finite(self, total: float) -> None:
        if not np.isfinite(total):
            raise RuntimeError(
                f"ctxfast.Embedder: vectors hold infinity or NaN; expected numbers. The model computes in "
                f"{self.dtype} and vectors are {self.vector_dtype.name}, and float16 ends at 65504. Pass "
                f"dtype='float32' or 'bfloat16' and vector_dtype='float32' (--dtype, --vector-dtype)."
            )


def _name_of(dtype: str | torch.dtype | None) -> str | None:
    """The name of a dtype: "float16" for torch.float16, too."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _check_encoder(model: object, device: str | torch.device, *options: object) -> None:
    """Refuse what is not a model, and arguments for opening a model beside one that is already open."""
    if any(not hasattr(model, name) for name in ("kind", "num_layers", "dim", "device", "prepare", "encode")):
        raise TypeError(
            f"ctxfast.Embedder: model is {described(model)}; expected a folder or a name, as a string or a path, or a "
            f"TextEncoder."
        )
    if device != "auto" or any(option is not None for option in options):
        raise ValueError(
            "ctxfast.Embedder: device, dtype, split, options_file or weight_file is given with a TextEncoder, which "
            "is open and on its device already; leave it out."
        )


def token_batches(lengths: Sequence[int], budget: int, *, is_padded: bool) -> list[list[int]]:
    """Group texts into batches of similar length, the longest first.

    Args:
        lengths: tokens of each text.
        budget: most tokens of a batch; a longer text is a batch of its own.
        is_padded: whether padding counts: all texts of a batch cost as much as its longest.

    Returns:
        Indices into ``lengths``, every one in exactly one batch; equal lengths keep their order.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = total = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        cost = (len(batch) + 1) * longest if is_padded else total + length
        if batch and cost > budget:
            batches.append(batch)
            batch, total = [], 0
        if not batch:
            longest = length
        batch.append(index)
        total += length
    if batch:
        batches.append(batch)
    return batches


def fixed_batches(count: int, size: int) -> list[list[int]]:
    """Batches of ``size`` texts in the order of the input."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
