# SPDX-License-Identifier: Apache-2.0
"""What BERT's heads share: outputs, checks of labels, the loss, reading files."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import checks
from .config import BertConfig
from .modeling import PADDING, Bert, BertOutput
from .pretrained import Pretrained

IGNORE_INDEX = -100
_Model = TypeVar("_Model", bound="BertWithHead")


class HeadOutput(NamedTuple):
    """``loss`` (a scalar, or None without labels), ``logits`` (see each model) and the encoder's packed output."""

    loss: Tensor | None
    logits: Tensor | None
    encoder: BertOutput


class PreTrainingOutput(NamedTuple):
    """The loss and its two terms (None without their labels), both heads' logits, the encoder's packed output."""

    loss: Tensor | None
    mlm_loss: Tensor | None
    nsp_loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor
    encoder: BertOutput


class SpanOutput(NamedTuple):
    """Loss (None without positions), (B, L) logits of start and end, the encoder's packed output."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    encoder: BertOutput


class Labels(NamedTuple):
    """Labels of texts (``dims`` 1) or tokens (2), below ``classes`` (None: not checked here)."""

    name: str
    labels: Tensor | None
    dims: int
    classes: int | None = None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy averaged over the rows with a label, in float32 or wider; 0 if no row has one."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.long()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _order_of_labels(file: BertConfig, wanted: BertConfig) -> list[int] | None:
    """For each wanted label its row in the file's classifier; None if that classifier has other labels."""
    if file.num_labels != wanted.num_labels:
        return None
    rows = file.label2id or {}
    is_named = any(name != f"LABEL_{row}" for name, row in rows.items())
    if not is_named or wanted.id2label is None:
        return list(range(file.num_labels))
    if set(rows) != set(wanted.id2label.values()):
        return None
    return [rows[wanted.id2label[k]] for k in range(wanted.num_labels)]


class BertWithHead(Pretrained):
    """A ``Bert`` under ``bert.`` and a head beside it."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool) -> None:
        super().__init__(config)
        self.bert = Bert(config, add_pooling_layer)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        path_or_name: str | os.PathLike[str],
        *,
        gelu: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        num_labels: int | list[str] | None = None,
        padding: str = "zero",
        download: bool = False,
    ) -> _Model:
        """Reads a model from files; the result is in eval mode.

        Args:
            path_or_name, gelu, dtype, device, padding, download: as ``Bert.from_pretrained``.
            num_labels: number or names of a classifier's labels; None for what the file says. A classifier with
                these names keeps its weights, reordered to match; one with other names is newly initialized.

        Raises:
            FileNotFoundError, ValueError: as ``load_checkpoint``.

        Warns:
            UserWarning: names the parameters that the file lacks, such as a new classifier; they are initialized
                randomly.
        """
        checks.choice("Bert", "padding", padding, PADDING)
        read = cls._read(path_or_name, gelu, download)
        if num_labels is not None and num_labels != read.config.num_labels:
            config = read.config.with_labels(num_labels)
            order = _order_of_labels(read.config, config)
            state_dict = {
                name: tensor[order] if order is not None and name.startswith("classifier.") else tensor
                for name, tensor in read.state_dict.items()
                if order is not None or not name.startswith("classifier.")
            }
            read = dataclasses.replace(read, config=config, state_dict=state_dict)
        model = cls._from_checkpoint(read, dtype, device)
        model.bert.padding = padding
        return model

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """As ``Bert.gradient_checkpointing_enable``."""
        self.bert.gradient_checkpointing_enable(enabled)

    def _encode(self, inputs: tuple[Tensor | None, ...], options: dict[str, Any], *labels: Labels) -> BertOutput:
        """Checks the labels and runs the encoder."""
        if isinstance(inputs[0], Tensor) and inputs[0].dim() == 2:  # else Bert refuses it
            for given in labels:
                self._check_labels(given, tuple(inputs[0].shape[: given.dims]))
        is_padded = options.get("output_hidden_states", False) or self.bert.keeps_padding(options.get("padding"))
        options.setdefault("return_packed", not is_padded)
        return self.bert(*inputs, **options)

    def _check_labels(self, given: Labels, shape: tuple[int, ...]) -> None:
        owner, name, labels = type(self).__name__, given.name, given.labels
        if labels is None:
            return
        legend = "(batch,)" if given.dims == 1 else "(batch, seqlen)"
        table = self.bert.embeddings.word_embeddings.weight
        checks.integer(owner, name, labels)
        checks.shape(owner, name, labels, shape, legend)
        checks.same(owner, "the model", table, [(name, labels)], dtype=False)
        # Selecting the labelled ones would wait for a GPU, or break a graph.
        if given.classes and checks.is_readable(labels):
            hint = f"{IGNORE_INDEX} marks what has no label."
            used = labels[labels != IGNORE_INDEX]
            checks.in_range(owner, name, used, 0, given.classes - 1, hint)
