# SPDX-License-Identifier: Apache-2.0
"""Which mentions of a document are of the same: end-to-end coreference."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.heads.coreference import CoreferenceResolver
from ...models.token_vectors import Sources
from ..readers.conll_brackets import Document
from .builder import Choice, TaskBuilder
from .coref_scores import coreference_scores
from .features import WordInputs, WordItem, save_feature_model
from .predictor import Predictor, label_numbers, write_text

Mention = tuple[int, int]


@dataclass(slots=True)
class _Sentences:
    """A document's sentences, its gold mentions (M, 3), and the speakers of sentences by number."""

    sentences: list[WordItem]
    gold: Tensor
    speakers: list[int]
    data: int

    @property
    def length(self) -> int:
        return sum(sentence.length for sentence in self.sentences)


class CoreferencePredictor(Predictor):
    """A ``CoreferenceResolver`` over a frozen BERT or ELMo, an ELMo trained with it, or words alone.

    Predictions are lists of clusters of mentions, each the first and the last word, counted through the document; in
    the order of the text, two mentions or more each.

    Args:
        model: the resolver, or an ``OverElmo`` around one.
        inputs: what the model reads of words.
        head: the options the resolver was made with, to make it again.
    """

    task = "coref"
    predict_batch = 1

    def __init__(self, model: nn.Module, inputs: WordInputs, *, head: dict[str, Any]) -> None:
        self.model, self._words = model, inputs
        self.form = inputs.form
        self.options = {"features": inputs.features, "head": head}

    @property
    def main_figure(self) -> str:
        return "f1"

    def items(self, examples: Sequence[Document]) -> list[_Sentences]:
        most = self.options["head"]["max_span"]
        items = []
        for index, document in enumerate(examples):
            rows = [(*mention, k) for k, cluster in enumerate(document.clusters) for mention in cluster]
            if lost := sum(last - first >= most for first, last, _ in rows):
                self.lost[f"mentions of more than {most} words, never found (--max-span)"] += lost
            speakers = label_numbers(list(dict.fromkeys(document.speakers)))
            items.append(
                _Sentences(
                    [WordItem(sentence) for sentence in document.sentences],
                    torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
                    [speakers[speaker] for speaker in document.speakers],
                    index,
                )
            )
        self._words.keep([sentence for item in items for sentence in item.sentences])
        return items

    def collate(self, items: Sequence[_Sentences]) -> dict[str, Any]:
        batch = self._words.collate([sentence for item in items for sentence in item.sentences])
        batch["documents"] = [len(item.sentences) for item in items]
        batch["speakers"] = torch.tensor([speaker for item in items for speaker in item.speakers])
        batch["labels"] = [item.gold for item in items]
        return batch

    def weight(self, batch: dict[str, Any]) -> float:
        return float(batch["lengths"].sum())

    def predict(self, examples: Sequence[Document], items: Sequence[Any] | None = None) -> list[list[list[Mention]]]:
        result: list[list[list[Mention]]] = [[] for _ in examples]
        for chosen, output in self.outputs(self.items(examples) if items is None else items):
            for item, spans, antecedents in zip(chosen, output.spans, output.antecedents):
                result[item.data] = clusters_of(spans.tolist(), antecedents.tolist())
        return result

    def scores(self, examples: Sequence[Document], predictions: Sequence[list[list[Mention]]]) -> dict[str, float]:
        """See ``coreference_scores``."""
        return coreference_scores([example.clusters for example in examples], predictions)

    def write_predictions(
        self, path: Path, examples: Sequence[Document], predictions: Sequence[list[list[Mention]]]
    ) -> list[Path]:
        """A JSON object a line: ``document``, ``clusters`` of [first word, last word], ``texts`` of the mentions."""
        lines = []
        for example, clusters in zip(examples, predictions):
            words = example.words
            texts = [[" ".join(words[first : last + 1]) for first, last in cluster] for cluster in clusters]
            entry = {"document": example.name, "clusters": clusters, "texts": texts}
            lines.append(json.dumps(entry, ensure_ascii=False))
        return [write_text(path, "\n".join(lines) + "\n")]

    def save_model(self, directory: Path) -> None:
        save_feature_model(self.model, self._words, directory)


def clusters_of(spans: Sequence[Sequence[int]], antecedents: Sequence[int]) -> list[list[Mention]]:
    """Clusters from spans in the order of the text and the place of each one's antecedent, -1 for none."""
    members: dict[int, list[Mention]] = {}
    root: list[int] = []
    for place, (first, last) in enumerate(spans):
        antecedent = antecedents[place]
        root.append(place if antecedent < 0 else root[antecedent])
        members.setdefault(root[place], []).append((first, last))
    return [cluster for cluster in members.values() if len(cluster) > 1]


class CoreferenceBuilder(TaskBuilder):
    """Of documents."""

    architecture = "ForCoreferenceResolution"
    heads = {"lstm": CoreferenceResolver}

    def network(self, model: Any, labels: Sequence[str], **place: Any) -> Any:
        raise ValueError(
            "ctxfast.finetune: task 'coref' with all of BERT trained is not there; expected features (--features mix), "
            "ELMo, or words alone."
        )

    def over_bert(
        self, network: Any, tokenizer: Any, labels: Sequence[str], choice: Choice, **options: Any
    ) -> Predictor:
        raise AssertionError("network raises first")

    def head_options(self, choice: Choice) -> dict[str, Any]:
        return choice.fields("max_span", "spans_per_word", "antecedents")

    def head(self, kind: Any, sources: Sources, labels: Sequence[str], **options: Any) -> nn.Module:
        return kind(sources, **options)

    def over_features(
        self, model: Any, inputs: WordInputs, labels: Sequence[str], choice: Choice, head: dict[str, Any]
    ) -> CoreferencePredictor:
        return CoreferencePredictor(model, inputs, head=head)

    def words(self, examples: Sequence[Document]) -> Iterable[Sequence[str]]:
        return (sentence for document in examples for sentence in document.sentences)

    def has_classes(self, num_labels: int) -> bool:
        return False
