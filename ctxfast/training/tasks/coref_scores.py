# SPDX-License-Identifier: Apache-2.0
"""Figures of coreference as CoNLL-2012's scorer counts them: mentions, MUC, B-cubed, CEAF by phi 4, and their mean.

Why our own: the kept packages read files of their own formats; these are checked against the examples of the reference
scorer's test suite.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

Clusters = Sequence[Sequence[Hashable]]
_Share = tuple[float, int]  # what is right, of how many


def coreference_scores(gold: Sequence[Clusters], predicted: Sequence[Clusters]) -> dict[str, float]:
    """``f1``, the mean of the F1 of ``muc``, ``b_cubed`` and ``ceaf``; of each and of ``mention`` ``_f1``,
    ``_precision`` and ``_recall``.

    Args:
        gold, predicted: the clusters of each document; mentions are whatever can be compared, each in one cluster of a
            side at most. Counts are summed over documents.

    Raises:
        ValueError: another number of documents, a mention in two clusters.

    Reference: Vilain et al. 1995; Bagga & Baldwin 1998; Luo 2005; Pradhan et al. 2014, which says how mentions that are
    on one side alone count.
    """
    if len(gold) != len(predicted):
        raise ValueError(
            f"ctxfast.metrics.coreference_scores: predicted has {len(predicted)} documents; expected {len(gold)}, as "
            f"gold."
        )
    for name, side in (("gold", gold), ("predicted", predicted)):
        for index, clusters in enumerate(side):
            mentions = [mention for cluster in clusters for mention in cluster]
            if len(set(mentions)) < len(mentions):
                raise ValueError(
                    f"ctxfast.metrics.coreference_scores: document {index} of {name} has a mention twice; expected it "
                    f"in one cluster, once."
                )
    result: dict[str, float] = {}
    for name, share in (("mention", _mentions), ("muc", _muc), ("b_cubed", _b_cubed)):
        recall = _total(share(one, other) for one, other in zip(gold, predicted))
        precision = _total(share(other, one) for one, other in zip(gold, predicted))
        result |= _figures(name, precision, recall)
    common = sum(_aligned(one, other) for one, other in zip(gold, predicted))
    sizes = [sum(map(len, side)) for side in (predicted, gold)]
    result |= _figures("ceaf", *(common / size if size else 0.0 for size in sizes))
    return {"f1": (result["muc_f1"] + result["b_cubed_f1"] + result["ceaf_f1"]) / 3, **result}


def _total(shares: Iterable[_Share]) -> float:
    found = list(shares)
    count = sum(count for _, count in found)
    return sum(right for right, _ in found) / count if count else 0.0


def _figures(name: str, precision: float, recall: float) -> dict[str, float]:
    total = precision + recall
    f1 = 2 * precision * recall / total if total else 0.0
    return {f"{name}_f1": f1, f"{name}_precision": precision, f"{name}_recall": recall}


def _places(clusters: Clusters) -> dict[Hashable, int]:
    return {mention: number for number, cluster in enumerate(clusters) for mention in cluster}


def _mentions(gold: Clusters, predicted: Clusters) -> _Share:
    one, other = _places(gold), _places(predicted)
    return len(one.keys() & other.keys()), len(one)


def _muc(gold: Clusters, predicted: Clusters) -> _Share:
    """Links of each cluster that the other side has: its size less the parts that the other side cuts it into."""
    places = _places(predicted)
    right = 0
    for cluster in gold:
        parts = {places[mention] for mention in cluster if mention in places}
        right += len(cluster) - len(parts) - sum(mention not in places for mention in cluster)
    return right, sum(len(cluster) - 1 for cluster in gold)


def _b_cubed(gold: Clusters, predicted: Clusters) -> _Share:
    """For each mention the share of its cluster that is with it on the other side, too."""
    right = sum(len(set(cluster) & set(other)) ** 2 / len(cluster) for cluster in gold for other in predicted)
    return right, sum(map(len, gold))


def _aligned(gold: Clusters, predicted: Clusters) -> float:
    """The largest sum of ``2 |A & B| / (|A| + |B|)`` over pairs of clusters, no cluster in two."""
    if not gold or not predicted:
        return 0.0
    if len(gold) > len(predicted):
        gold, predicted = predicted, gold
    values = [[2 * len(set(one) & set(other)) / (len(one) + len(other)) for other in predicted] for one in gold]
    return sum(values[row][column] for row, column in enumerate(best_pairs(values)))


def best_pairs(values: Sequence[Sequence[float]]) -> list[int]:
    """For each row a column of its own, so that the sum of the chosen values is largest; rows <= columns.

    Row after row is added along the shortest augmenting path in reduced costs.

    Reference: Kuhn 1955; Jonker & Volgenant 1987.
    """
    count = len(values[0])
    row_of: list[int] = [-1] * count
    row_price, column_price = [0.0] * len(values), [0.0] * count
    for start in range(len(values)):
        distance = [math.inf] * count
        before = [-1] * count  # the column before on the path; -1: the path begins here
        done: list[int] = []
        row, base, last = start, 0.0, -1
        while row >= 0:
            for column in set(range(count)) - set(done):
                cost = base - values[row][column] - row_price[row] - column_price[column]
                if cost < distance[column]:
                    distance[column], before[column] = cost, last
            last = min(set(range(count)) - set(done), key=lambda column: distance[column])
            base = distance[last]
            done.append(last)
            row = row_of[last]
        row_price[start] += base
        for column in done[:-1]:
            row_price[row_of[column]] += base - distance[column]
            column_price[column] -= base - distance[column]
        while last >= 0:
            row_of[last] = start if before[last] < 0 else row_of[before[last]]
            last = before[last]
    chosen = [0] * len(values)
    for column, row in enumerate(row_of):
        if row >= 0:
            chosen[row] = column
    return chosen
