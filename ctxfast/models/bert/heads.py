# SPDX-License-Identifier: Apache-2.0
"""BERT with a head: masked words, next sentence, text and token classes, answer spans.

Heads and losses see packed rows only: nothing is computed at padding, and a label at padding does not count. With
``padding="keep"`` (see ``Bert``) all rows count as tokens, and logits and losses are Hugging Face's. Names of
parameters and state_dict are those of Hugging Face's BertFor... classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ..._core import checks
from ...nn import LayerNorm, tools
from .config import PROBLEMS, BertConfig
from .head_base import IGNORE_INDEX, BertWithHead, HeadOutput, Labels, PreTrainingOutput, SpanOutput, cross_entropy
from .modeling import BertOutput

__all__ = [
    "IGNORE_INDEX",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "HeadOutput",
    "PreTrainingOutput",
    "SpanOutput",
]


def _pooled(encoded: BertOutput) -> Tensor:
    """(B, N), of a model that has a pooler."""
    assert encoded.pooler_output is not None
    return encoded.pooler_output


class _Transform(nn.Module):
    """``LayerNorm(activation(x W^T + b))`` before the decoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.LayerNorm = LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        # RoBERTa's and ELECTRA's head has GELU whatever the encoder's activation is.
        is_fixed = (config.is_roberta or config.model_type == "electra") and not config.activation.startswith("gelu")
        self.activation = "gelu" if is_fixed else config.activation

    def forward(self, x: Tensor) -> Tensor:
        """(T, N) -> (T, N)."""
        return self.LayerNorm(tools.linear(x, self.dense, self.activation))


class _Predictions(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)


class _Heads(nn.Module):
    """The ``cls`` of Hugging Face's names: ``predictions`` and ``seq_relationship``, where the model has them."""

    def __init__(self, config: BertConfig, *, predictions: bool = False, seq_relationship: bool = False) -> None:
        super().__init__()
        if predictions:
            self.predictions = _Predictions(config)
        if seq_relationship:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class _MaskedLM(BertWithHead):
    """Decoder tied to the word table, and the loss over the labelled rows."""

    def __init__(self, config: BertConfig, *, seq_relationship: bool) -> None:
        super().__init__(config, add_pooling_layer=seq_relationship)
        self.cls = _Heads(config, predictions=True, seq_relationship=seq_relationship)
        self.init_weights(self.cls)
        self.tie_weights()
        # assign=True replaces parameters one by one, and files leave the tied copies out.
        self.register_load_state_dict_post_hook(_after_loading)

    def tie_weights(self) -> None:
        """Ties the decoder's bias to ``cls.predictions.bias`` and, unless the config says otherwise, its weight to the
        word embeddings."""
        predictions = self.cls.predictions
        predictions.decoder.bias = predictions.bias
        if self.config.tie_word_embeddings:
            predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def _mlm_logits(self, encoded: BertOutput) -> Tensor:
        """(B, L, V), zeros at padding."""
        decoder = self.cls.predictions.decoder
        hidden = self.cls.predictions.transform(encoded.packed_last_hidden_state)
        return encoded.packing.unpack(tools.linear(hidden, decoder))

    def _mlm_loss(self, encoded: BertOutput, labels: Tensor, labelled: Tensor | None) -> Tensor:
        decoder, packing = self.cls.predictions.decoder, encoded.packing
        hidden, labels = encoded.packed_last_hidden_state, packing.pack(labels)
        ignored: int | None = IGNORE_INDEX
        # One in seven tokens has a label, so the head runs on those rows only. Their number is read on the host: a GPU
        # is waited for once, unless the caller names them. A compiled or captured graph, where that would break it,
        # keeps all rows.
        if labelled is None and not torch.compiler.is_compiling() and checks.has_values(labels):
            if not (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
                labelled = (labels != IGNORE_INDEX).nonzero().flatten()
        if labelled is not None:
            hidden, labels, ignored = hidden.index_select(0, labelled), labels.index_select(0, labelled), None
        hidden = self.cls.predictions.transform(hidden)
        return functional.linear_cross_entropy(hidden, decoder.weight, labels, decoder.bias, ignore_index=ignored)

    def _check_labelled(self, labelled: Tensor | None) -> None:
        if labelled is not None:
            owner = type(self).__name__
            checks.shape(owner, "labelled", checks.integer(owner, "labelled", labelled), (None,), "(labelled tokens,)")
            table = self.bert.embeddings.word_embeddings.weight
            checks.same(owner, "the model", table, [("labelled", labelled)], dtype=False)


def _after_loading(model: _MaskedLM, incompatible: Any) -> None:
    """Ties the weights again; a tied copy is not reported missing if the state_dict has the original."""
    model.tie_weights()
    missing = incompatible.missing_keys
    originals = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    if model.config.tie_word_embeddings:
        originals["cls.predictions.decoder.weight"] = "bert.embeddings.word_embeddings.weight"
    for copy, original in originals.items():
        for key in [key for key in missing if key.endswith(copy)]:
            if key.removesuffix(copy) + original not in missing:
                missing.remove(key)


class BertForMaskedLM(_MaskedLM):
    """BERT with a masked language modelling head: a transform and a decoder tied to the word embeddings.

    Reference: Devlin et al. 2019, section 3.1; names as in Hugging Face's BertForMaskedLM.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, seq_relationship=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        labelled: Tensor | None = None,
        return_logits: bool | None = None,
        **options: Any,
    ) -> HeadOutput:
        """As ``Bert.forward``, and:

        Args:
            labels: (B, L) int64 or int32 word ids, -100 where there is no label. The loss is the mean over labelled
                tokens, 0 without any; only their rows go through the head.
            labelled: (M,) int64, which tokens have a label, counted over the texts' tokens without padding (rows of
                ``encoder.packed_last_hidden_state``). Found in ``labels`` if None, for which the host waits for a GPU.
            return_logits: whether to compute (B, L, V) logits, zeros at padding; None: only without labels.

        Returns:
            ``HeadOutput(loss, logits, encoder)``.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, task_type_ids)
        self._check_labelled(labelled)
        encoded = self._encode(inputs, options, Labels("labels", labels, 2))
        loss = None if labels is None else self._mlm_loss(encoded, labels, labelled)
        is_wanted = labels is None if return_logits is None else return_logits
        return HeadOutput(loss, self._mlm_logits(encoded) if is_wanted else None, encoded)


class BertForPreTraining(_MaskedLM):
    """BERT with its pretraining heads: masked language modelling and next sentence prediction.

    Reference: Devlin et al. 2019, section 3.1; names as in Hugging Face's BertForPreTraining.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, seq_relationship=True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        labelled: Tensor | None = None,
        return_logits: bool | None = None,
        **options: Any,
    ) -> PreTrainingOutput:
        """As ``BertForMaskedLM.forward``, and:

        Args:
            next_sentence_label: (B,) int64, 0 where the second sentence follows the first, 1 where it does not.

        Returns:
            ``PreTrainingOutput``; its loss is the sum of the losses whose labels were given.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, task_type_ids)
        self._check_labelled(labelled)
        encoded = self._encode(
            inputs,
            options,
            Labels("labels", labels, 2),
            Labels("next_sentence_label", next_sentence_label, 1, classes=2),
        )
        nsp_logits = tools.linear(_pooled(encoded), self.cls.seq_relationship)
        mlm_loss = None if labels is None else self._mlm_loss(encoded, labels, labelled)
        nsp_loss = None if next_sentence_label is None else cross_entropy(nsp_logits, next_sentence_label)
        parts = [part for part in (mlm_loss, nsp_loss) if part is not None]
        is_wanted = labels is None if return_logits is None else return_logits
        return PreTrainingOutput(
            loss=sum(parts[1:], parts[0]) if parts else None,
            mlm_loss=mlm_loss,
            nsp_loss=nsp_loss,
            prediction_logits=self._mlm_logits(encoded) if is_wanted else None,
            seq_relationship_logits=nsp_logits,
            encoder=encoded,
        )


class BertForNextSentencePrediction(BertWithHead):
    """BERT with a next sentence prediction head. Names as in Hugging Face's BertForNextSentencePrediction."""

    _task = "NextSentencePrediction"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=True)
        self.cls = _Heads(config, seq_relationship=True)
        self.init_weights(self.cls)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> HeadOutput:
        """As ``Bert.forward``; labels (B,) int64, 0 if the second sentence follows the first, else 1; logits (B, 2)."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, task_type_ids)
        encoded = self._encode(inputs, options, Labels("labels", labels, 1, classes=2))
        logits = tools.linear(_pooled(encoded), self.cls.seq_relationship)
        return HeadOutput(None if labels is None else cross_entropy(logits, labels), logits, encoded)


class BertForSequenceClassification(BertWithHead):
    """One label, several labels or numbers for each text, from the pooled first token.

    The kind of problem is the config's ``problem_type``; without one it is regression for a single label, one class for
    integer labels, several classes for floating-point labels, as in Hugging Face.

    With a RoBERTa or ELECTRA config the pooler is what Hugging Face calls ``classifier.dense``, with DistilBERT's
    ``pre_classifier`` (files are renamed on the way in and out); before ``classifier.dense`` Hugging Face applies
    dropout, too, this class only after it.
    """

    _task = "SequenceClassification"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=True)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(self.classifier)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> HeadOutput:
        """As ``Bert.forward``; labels (B,) classes, (B, C) 0 or 1 for several labels, or numbers; logits (B, C)."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, task_type_ids)
        problem = None if labels is None else self._problem(labels)
        given = ()
        if problem == "single_label_classification":
            given = (Labels("labels", labels, 1, self.config.num_labels),)
        elif labels is not None and isinstance(input_ids, Tensor):
            labels = self._check_numbers(labels, len(input_ids))
        encoded = self._encode(inputs, options, *given)
        pooled = F.dropout(_pooled(encoded), self.config.head_dropout, self.training)
        logits = tools.linear(pooled, self.classifier)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if labels is None:
            loss = None
        elif problem == "single_label_classification":
            loss = cross_entropy(logits, labels)
        elif problem == "regression":
            loss = F.mse_loss(wide, labels.to(wide.dtype))
        else:
            loss = F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype))
        return HeadOutput(loss, logits, encoded)

    def _problem(self, labels: Tensor) -> str:
        checks.tensor(type(self).__name__, "labels", labels)
        regression, one_class, several = PROBLEMS
        problem = self.config.extra.get("problem_type")
        if problem is not None:
            return problem
        if self.config.num_labels == 1:
            return regression
        return one_class if labels.dtype in (torch.int64, torch.int32) else several

    def _check_numbers(self, labels: Tensor, batch_size: int) -> Tensor:
        """Labels of regression and of several classes, as (B, C)."""
        owner, classes = type(self).__name__, self.config.num_labels
        checks.same(owner, "the model", self.classifier.weight, [("labels", labels)], dtype=False)
        if classes == 1 and labels.dim() == 1:
            labels = labels[:, None]
        checks.shape(owner, "labels", labels, (batch_size, classes), "(batch, num_labels)")
        return labels


class BertForTokenClassification(BertWithHead):
    """One of ``num_labels`` classes for each token. Names as in Hugging Face's BertForTokenClassification."""

    _task = "TokenClassification"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(self.classifier)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> HeadOutput:
        """As ``Bert.forward``; labels (B, L) classes, -100 for none; logits (B, L, C), zeros at padding."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, task_type_ids)
        encoded = self._encode(inputs, options, Labels("labels", labels, 2, self.config.num_labels))
        hidden = F.dropout(encoded.packed_last_hidden_state, self.config.token_dropout, self.training)
        logits = tools.linear(hidden, self.classifier)
        loss = None if labels is None else cross_entropy(logits, encoded.packing.pack(labels))
        return HeadOutput(loss, encoded.packing.unpack(logits), encoded)


class BertForQuestionAnswering(BertWithHead):
    """Start and end of an answer among the tokens of a text.

    Padding gets the lowest finite logit, hence no probability. Hugging Face lets padding compete, so losses on padded
    batches differ from its; without padding, and with ``padding="keep"``, they agree. Names as in Hugging Face's
    BertForQuestionAnswering.
    """

    _task = "QuestionAnswering"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights(self.qa_outputs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **options: Any,
    ) -> SpanOutput:
        """As ``Bert.forward``, and:

        Args:
            start_positions, end_positions: (B,) int64 columns, both or neither. Negative ones mean column 0; those past
                the end or at padding are ignored by the loss.

        Returns:
            A ``SpanOutput``; the loss is the mean of both cross entropies.
        """
        if (start_positions is None) != (end_positions is None):
            missing = "start_positions" if start_positions is None else "end_positions"
            raise ValueError(
                f"ctxfast.BertForQuestionAnswering: {missing} is None; expected both start_positions and "
                "end_positions, or neither."
            )
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, task_type_ids)
        encoded = self._encode(
            inputs, options, Labels("start_positions", start_positions, 1), Labels("end_positions", end_positions, 1)
        )
        packing = encoded.packing
        hidden = F.dropout(encoded.packed_last_hidden_state, self.config.span_dropout, self.training)
        packed = tools.linear(hidden, self.qa_outputs)
        logits = packing.unpack(packed, fill=torch.finfo(packed.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            is_real = packing.unpack(torch.ones_like(packing.indices, dtype=torch.bool), fill=False)
            start = self._loss(start_logits, start_positions, is_real)
            loss = (start + self._loss(end_logits, end_positions, is_real)) / 2
        return SpanOutput(loss, start_logits, end_logits, encoded)

    def _loss(self, logits: Tensor, positions: Tensor, is_real: Tensor) -> Tensor:
        positions = positions.long().clamp(min=0)
        is_inside = positions < logits.shape[1]
        columns = positions.clamp(max=max(logits.shape[1] - 1, 0))
        is_answer = is_inside & is_real.gather(1, columns[:, None])[:, 0]
        return cross_entropy(logits, torch.where(is_answer, columns, IGNORE_INDEX))
