# SPDX-License-Identifier: Apache-2.0
"""Figures of held-out data, as the papers and the shared tasks count them. All are fractions of 1."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..._core.extras import need

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _library(name: str) -> Any:
    return need("ctxfast.metrics", name, "this figure", "finetune")


def check_libraries(task: str, is_spans: bool = False) -> None:
    """Refuse a task whose figures need what is not installed: better before training than after.

    Args:
        task: "classify", "pair", "tag" or "span".
        is_spans: whether tags are spans.

    Raises:
        RuntimeError: naming what is not installed.
    """
    if task in ("classify", "pair"):
        _library("torchmetrics.functional.classification")
    elif task == "tag" and is_spans:
        _library("nervaluate")


def _same_length(who: str, gold: Sequence[Any], predicted: Sequence[Any]) -> None:
    if len(gold) != len(predicted) or not gold:
        raise ValueError(
            f"ctxfast.metrics.{who}: predicted has {len(predicted)} entries; expected {len(gold)}, as gold, and more "
            f"than 0."
        )


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole spans of the right kind: ``precision``, ``recall``, ``f1``, and ``f1_KIND``.

    Tags are BIO. A span begins at B-x, and at an I-x that goes on with nothing of its kind, as in CoNLL-2003's
    conlleval, so that ill-formed output counts as a reader would take it.

    Args:
        gold, predicted: the tags of each sentence; both have the same lengths.

    Raises:
        ValueError: other lengths.
        RuntimeError: nervaluate is not installed.

    Reference: Tjong Kim Sang & De Meulder 2003; counted by nervaluate's strict scores, which agree with seqeval's.
    """
    _same_length("entity_scores", gold, predicted)
    for index, (one, other) in enumerate(zip(gold, predicted)):
        if len(one) != len(other):
            raise ValueError(
                f"ctxfast.metrics.entity_scores: sentence {index} has {len(other)} predicted tags; expected {len(one)}."
            )
    kinds = sorted({tag[2:] for tags in (*gold, *predicted) for tag in tags if tag != "O"})
    if not kinds:
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    nervaluate = _library("nervaluate")
    found = nervaluate.Evaluator(
        [list(tags) for tags in gold], [list(tags) for tags in predicted], tags=kinds, loader="list"
    ).evaluate()
    strict = found["overall"]["strict"]
    result = {"f1": strict.f1, "precision": strict.precision, "recall": strict.recall}
    return result | {f"f1_{kind}": found["entities"][kind]["strict"].f1 for kind in kinds}


def token_accuracy(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Share of words with the right tag."""
    pairs = [pair for one, other in zip(gold, predicted) for pair in zip(one, other)]
    return sum(one == other for one, other in pairs) / max(len(pairs), 1)


def class_scores(gold: Sequence[int], predicted: Sequence[int], num_classes: int) -> dict[str, float]:
    """``accuracy``, ``f1_macro``, ``matthews`` and, for two classes, ``f1`` (of class 1).

    The mean of F1 is over the classes that occur in gold or predicted. The correlation with a side that is all one
    class is 0, as scikit-learn has it.

    Raises:
        ValueError: no entries, or other lengths.
        RuntimeError: torchmetrics is not installed.
    """
    _same_length("class_scores", gold, predicted)
    functional = _library("torchmetrics.functional.classification")
    one, other = torch.tensor(predicted), torch.tensor(gold)
    size = {"num_classes": max(num_classes, 2)}
    result = {
        "accuracy": float((one == other).double().mean()),
        "f1_macro": float(functional.multiclass_f1_score(one, other, average="macro", **size)),
        # torchmetrics has 0.41 for [0, 0, 1] against [0, 0, 0].
        "matthews": float(functional.multiclass_matthews_corrcoef(one, other, **size)) if _vary(one, other) else 0.0,
    }
    if num_classes == 2:
        result["f1"] = float(functional.binary_f1_score(one, other))
    return result


def regression_scores(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """``pearson``, ``spearman`` and ``mse`` (mean squared error). Correlations with a constant are 0."""
    _same_length("regression_scores", gold, predicted)
    functional = _library("torchmetrics.functional.regression")
    one, other = (torch.tensor(values, dtype=torch.float64) for values in (predicted, gold))
    found = {"pearson": 0.0, "spearman": 0.0, "mse": float((one - other).square().mean())}
    if _vary(one, other):
        # Spearman's is Pearson's of ranks, where equals share the mean of theirs.
        ranks = [_ranks(values) for values in (one, other)]
        found["pearson"] = float(functional.pearson_corrcoef(one, other))
        found["spearman"] = float(functional.pearson_corrcoef(*ranks))
    return found


def _vary(*sides: torch.Tensor) -> bool:
    return all(bool((side != side[0]).any()) for side in sides)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[places]


# SQuAD


def normalized_answer(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _answer_f1(gold: str, predicted: str) -> float:
    one, other = normalized_answer(gold).split(), normalized_answer(predicted).split()
    if not one or not other:
        return float(one == other)
    shared = sum((collections.Counter(one) & collections.Counter(other)).values())
    return 2 * shared / (len(one) + len(other))


def _answer_exact(gold: str, predicted: str) -> float:
    return float(normalized_answer(gold) == normalized_answer(predicted))


def _real_answers(answers: Sequence[str]) -> list[str]:
    """Those that are more than articles and punctuation, as in SQuAD 2.0's script."""
    return [answer for answer in answers if normalized_answer(answer)]


def squad_scores(gold: Mapping[str, Sequence[str]], predicted: Mapping[str, str]) -> dict[str, float]:
    """``exact`` and ``f1``; where some question has no answer also ``has_answer_exact``, ``has_answer_f1`` and
    ``no_answer_accuracy``.

    Args:
        gold: id -> answers, none for a question that cannot be answered.
        predicted: id -> answer, "" for none.

    Of several answers the one that fits best counts; with none, only "" is right.

    Raises:
        ValueError: a question without a prediction, or no questions.

    Reference: Rajpurkar et al. 2016, 2018 (the scripts of SQuAD 1.1 and 2.0).
    """
    if not gold:
        raise ValueError("ctxfast.metrics.squad_scores: gold is empty; expected questions.")
    missing = [id for id in gold if id not in predicted]
    if missing:
        raise ValueError(
            f"ctxfast.metrics.squad_scores: predicted has no answer to {len(missing)} of {len(gold)} questions, "
            f"{missing[0]} the first; expected one for each ('' for none)."
        )
    exact: dict[bool, list[float]] = {True: [], False: []}
    f1: dict[bool, list[float]] = {True: [], False: []}
    for id, answers in gold.items():
        real = _real_answers(answers)
        guess = predicted[id]
        exact[bool(real)].append(max(_answer_exact(answer, guess) for answer in real or [""]))
        f1[bool(real)].append(max(_answer_f1(answer, guess) for answer in real or [""]))
    count = len(gold)
    result = {"exact": sum(map(sum, exact.values())) / count, "f1": sum(map(sum, f1.values())) / count}
    if exact[False]:
        result["no_answer_accuracy"] = sum(exact[False]) / len(exact[False])
        if exact[True]:
            result["has_answer_exact"] = sum(exact[True]) / len(exact[True])
            result["has_answer_f1"] = sum(f1[True]) / len(f1[True])
    return result


def squad_best_scores(
    gold: Mapping[str, Sequence[str]], answers: Mapping[str, str], null_odds: Mapping[str, float]
) -> dict[str, float]:
    """``best_exact`` and ``best_f1`` that a threshold for "no answer" can give, and these, ``best_..._threshold``.

    Args:
        gold: as ``squad_scores``.
        answers: id -> the best answer there is, whether or not none is likelier.
        null_odds: id -> how much likelier none is: the answer is given where this is not above the threshold.

    Reference: find_best_thresh of SQuAD 2.0's script; but with its threshold ``squad_scores`` gives the very figure:
    questions of equal odds are answered together, and where it is best to answer none, it lies below all odds.
    """
    order = sorted(gold, key=lambda id: null_odds[id])
    result = {}
    for name, figure in (("exact", _answer_exact), ("f1", _answer_f1)):
        score = best = float(sum(not _real_answers(answers) for answers in gold.values()))
        threshold = null_odds[order[0]] - 1
        for place, id in enumerate(order):
            real = _real_answers(gold[id])
            # To answer what has no answer loses the point of having said none.
            score += max(figure(one, answers[id]) for one in real) if real else -bool(normalized_answer(answers[id]))
            is_last_of_equals = place + 1 == len(order) or null_odds[order[place + 1]] != null_odds[id]
            if score > best and is_last_of_equals:
                best, threshold = score, null_odds[id]
        result |= {f"best_{name}": best / len(gold), f"best_{name}_threshold": threshold}
    return result
