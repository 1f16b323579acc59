# SPDX-License-Identifier: Apache-2.0
"""Pretraining of BERT and its kin on prepared sequences: masked words, and how the segments belong together."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._core.choice import use_impl
from ...models.bert.config import BertConfig
from ...models.bert.head_base import IGNORE_INDEX
from ...models.bert.heads import BertForMaskedLM, BertForPreTraining
from ...models.bert.tokenization import BertTokenizer
from ..loop.batches import Batches
from ..loop.task import BaseTask, Weight
from ..loop.train import moved
from .bert_corpus import BertCorpus
from .bert_instances import Instance, Pair, Vocabulary
from .knowledge_masking import units
from .knowledge_spans import ID_MASK

_WHO = "ctxfast.training.BertPretraining"
# Logits of evaluation, (B, L, V) float32, stay within so many bytes.
_LOGIT_BYTES = 256 << 20
# Google's smaller models: layers, hidden size; heads of 64.
SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


def sized_config(size: str, vocab_size: int, max_position_embeddings: int = 512) -> BertConfig:
    """The config of one of Google's models over another vocabulary.

    Args:
        size: "tiny", "mini", "small", "medium", "base" or "large".

    Reference: Turc et al. 2019 for the smaller ones.
    """
    if size not in SIZES:
        raise ValueError(f"{_WHO}: size is {size!r}; expected one of {', '.join(SIZES)}.")
    layers, hidden = SIZES[size]
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=max_position_embeddings,
    )


@dataclass(frozen=True)
class BertBatch:
    """Sequences padded to the longest, (B, L) each; ``relation`` (B,) is 1 where the segments do not belong together
    (ERNIE's sign: where they do). ``lengths`` are their tokens, on the host, and ``labelled`` (M,) which of all these
    tokens have a label: of a mask and of labels they would be read back."""

    input_ids: Tensor
    lengths: tuple[int, ...]
    token_type_ids: Tensor
    labels: Tensor
    labelled: Tensor
    relation: Tensor


def entities_masked(pair: Pair, mask_id: int, vocabulary: Vocabulary, rate: float, draw: random.Random) -> Instance:
    """A pair with entities of several words masked, all their pieces, until ``rate`` of its tokens are."""
    original = [code & ID_MASK for code in pair.ids]
    words = {unit[0] for unit in units(pair.ids, vocabulary, "word")}
    found = [unit for unit in units(pair.ids, vocabulary, "entity") if sum(place in words for place in unit) > 1]
    draw.shuffle(found)
    quota, ids, chosen = max(1, round(len(original) * rate)), list(original), []
    for unit in found:
        if len(chosen) + len(unit) <= quota:
            chosen += unit
            for place in unit:
                ids[place] = mask_id
    chosen.sort()
    labels = [original[place] for place in chosen]
    return Instance(ids, pair.first_length, pair.is_random_next, chosen, labels, pair.types)


class BertPretraining(BaseTask):
    """Trains a BERT on prepared sequences.

    Args:
        corpus: sequences; with ``recipe.pairs`` "none" only masked words are trained, else the relation of the
            segments, too.
        tokenizer: it was made with; saved beside the model.
        config: sizes; None with ``init_from``.
        init_from: a model to start from; heads it lacks start at random.
        held_out: sequences to judge by, with stored masks; the same for every kind of masking.
        has_entities: the held-out sequences carry entities, whose loss is reported, too.
        batch_size: sequences of a micro-batch of a process; they are of like length.
        relation_sign: "google": 1 where segments do not belong together; "ernie": 1 where they do.
        seed: of first weights and the order of sequences.
        impl: implementation of every op; None chooses.

    Figures of ``evaluate``: ``loss`` (all parts), ``masked_loss``, ``masked_accuracy``, ``perplexity``,
    ``relation_accuracy``, ``entity_loss`` and ``entity_accuracy`` (tokens of entities of several words, all masked).

    Raises:
        ValueError: a vocabulary larger than the model's word table, sequences longer than its positions.

    Reference: Devlin et al. 2019; Sun et al. 2019 (ERNIE 1.0); Lan et al. 2020 (sentence order).
    """

    model: BertForPreTraining | BertForMaskedLM

    def __init__(
        self,
        corpus: BertCorpus,
        tokenizer: BertTokenizer,
        config: BertConfig | None = None,
        *,
        init_from: str | Path | None = None,
        held_out: BertCorpus | None = None,
        has_entities: bool = False,
        batch_size: int = 32,
        relation_sign: str = "google",
        seed: int = 0,
        impl: str | None = None,
    ) -> None:
        if (config is None) == (init_from is None):
            raise ValueError(f"{_WHO}: config and init_from are both given or both None; expected one of them.")
        if relation_sign not in ("google", "ernie"):
            raise ValueError(f"{_WHO}: relation_sign is {relation_sign!r}; expected 'google' or 'ernie'.")
        self.corpus, self.tokenizer, self.held_out = corpus, tokenizer, held_out
        self.has_entities, self.seed, self.impl = has_entities, seed, impl
        self._is_ernie = relation_sign == "ernie"
        self.has_relation = corpus.recipe.pairs != "none"
        kind = BertForPreTraining if self.has_relation else BertForMaskedLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if config is not None:
                self.model = kind(config)
            elif init_from is not None:
                self.model = kind.from_pretrained(init_from)
        config = self.model.config
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{_WHO}: the vocabulary has {tokenizer.vocab_size} tokens and the model's word table "
                f"{config.vocab_size} rows; expected no more tokens than rows. Use the model's own vocabulary."
            )
        if self.has_relation and config.type_vocab_size < 2:
            raise ValueError(
                f"{_WHO}: the model has {config.type_vocab_size} token type; expected 2 for pairs. Use a recipe with "
                "pairs 'none' (--pairs none)."
            )
        longest = corpus.recipe.options.max_seq_length
        if longest > config.max_length:
            raise ValueError(
                f"{_WHO}: max_seq_length is {longest}; expected at most the model's {config.max_length} positions."
            )
        self.batches = Batches(len(corpus), batch_size, seed, corpus.lengths)

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> BertBatch:
        epoch = (step * ranks + rank) // self.batches.per_epoch
        return self._batch([self.corpus.instance(index, epoch) for index in self.batches(step, rank, ranks)])

    def _batch(self, instances: Sequence[Instance]) -> BertBatch:
        shape = (len(instances), max(len(one.ids) for one in instances))
        ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        types = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        before, labelled = 0, []
        for row, one in enumerate(instances):
            size = len(one.ids)
            ids[row, :size], types[row, :size] = one.ids, one.token_type_ids
            labels[row, one.positions] = one.labels
            labelled += sorted(before + place for place in one.positions)
            before += size
        relation = np.array([one.is_random_next != self._is_ernie for one in instances], dtype=np.int64)
        ids, types, labels, relation = map(torch.from_numpy, (ids, types, labels, relation))
        lengths = tuple(len(one.ids) for one in instances)
        return BertBatch(ids, lengths, types, labels, torch.tensor(labelled, dtype=torch.int64), relation)

    def size(self, batch: BertBatch) -> int:
        return sum(batch.lengths)

    def weight(self, batch: BertBatch) -> Weight:
        masked = float((batch.labels != IGNORE_INDEX).sum())
        return {"masked_loss": masked, "relation_loss": float(len(batch.relation))} if self.has_relation else masked

    def _call(self, model: nn.Module, batch: BertBatch, **options: Any) -> Any:
        if self.has_relation:
            options["next_sentence_label"] = batch.relation
        with use_impl(self.impl):
            options.update(labels=batch.labels, lengths=batch.lengths, labelled=batch.labelled)
            return model(batch.input_ids, None, batch.token_type_ids, **options)

    def loss(self, model: nn.Module, batch: BertBatch) -> tuple[Tensor | dict[str, Tensor], dict[str, Tensor]]:
        found = self._call(model, batch)
        if not self.has_relation:
            return found.loss, {}
        # Means over masked tokens and over sequences: batches of like length differ in one and not in the other.
        return {"masked_loss": found.mlm_loss, "relation_loss": found.nsp_loss}, {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.held_out is None:
            return {}
        instances = [self.held_out.instance(index) for index in range(len(self.held_out))]
        losses, right, labelled, related = self._judge(model, instances)
        figures = {"masked_loss": losses / labelled, "masked_accuracy": right / labelled}
        figures["perplexity"] = math.exp(min(figures["masked_loss"], 700.0))
        if self.has_relation:
            loss, correct = related
            figures["relation_accuracy"] = correct / len(instances)
            figures = {"loss": figures["masked_loss"] + loss / len(instances), **figures}
        else:
            figures = {"loss": figures["masked_loss"], **figures}
        if self.has_entities:
            mask_id, vocabulary = self.tokenizer.mask_token_id, self.corpus.vocabulary
            marked = []
            for index in range(len(self.held_out)):
                draw = random.Random(index)
                one = entities_masked(self.held_out.pair(index), mask_id, vocabulary, 0.15, draw)
                if one.positions:
                    marked.append(one)
            if marked:
                losses, right, labelled, _ = self._judge(model, marked)
                figures |= {"entity_loss": losses / labelled, "entity_accuracy": right / labelled}
        return figures

    def _judge(self, model: nn.Module, instances: Sequence[Instance]) -> tuple[float, float, int, tuple[float, float]]:
        """Sum of masked losses, right guesses, masked tokens; sum of relation losses and right ones."""
        device = next(self.model.parameters()).device
        losses = right = labelled = relation_loss = relation_right = 0.0
        for part in self._parts(instances):
            batch = moved(self._batch(part), device)
            found = self._call(model, batch, return_logits=True)
            is_labelled = batch.labels != IGNORE_INDEX
            count = int(is_labelled.sum())
            logits = found.prediction_logits if self.has_relation else found.logits
            masked_loss = found.mlm_loss if self.has_relation else found.loss
            losses += float(masked_loss) * count
            right += float((logits[is_labelled].argmax(-1) == batch.labels[is_labelled]).sum())
            labelled += count
            if self.has_relation:
                relation_loss += float(found.nsp_loss) * len(part)
                relation_right += float((found.seq_relationship_logits.argmax(-1) == batch.relation).sum())
        return losses, right, max(1, int(labelled)), (relation_loss, relation_right)

    def _parts(self, instances: Sequence[Instance]) -> Iterator[list[Instance]]:
        """Batches of similar length that bound the memory of their logits."""
        part: list[Instance] = []
        for one in sorted(instances, key=lambda one: len(one.ids)):
            size = (len(part) + 1) * len(one.ids) * self.model.config.vocab_size * 4
            if part and size > _LOGIT_BYTES:
                yield part
                part = []
            part.append(one)
        if part:
            yield part

    def save(self, directory: Path) -> None:
        """The model and its tokenizer as Hugging Face lays them out."""
        self.model.save_pretrained(directory)
        self.tokenizer.save(directory)
