# SPDX-License-Identifier: Apache-2.0
"""Coreference: the figures against the reference scorer's published examples, the model against a second writing of its
equations, and the command."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch

from ctxfast.cli import main
from ctxfast.models.heads.coreference import CoreferenceResolver
from ctxfast.models.token_vectors import Sources
from ctxfast.training.readers.conll_brackets import read_coreference
from ctxfast.training.tasks.build import Choice, build, load
from ctxfast.training.tasks.coref import clusters_of
from ctxfast.training.tasks.coref_scores import best_pairs, coreference_scores
from ctxfast.training.tasks.predictor import FineTune

# Cases A1 to A6, A10 and A11 of the suite of conll/reference-coreference-scorers: the response to {a} {bc} {def}, and
# (recall, precision) of MUC, B-cubed and CEAF by phi 4 where the suite has it.
PUBLISHED = [
    ("a bc def", (1, 1), (1, 1), (1, 1)),
    ("a de", (1 / 3, 1), (7 / 18, 1), (0.6, 0.9)),
    ("a bcx defy z", (1, 3 / 5), (1, (4 + 7 / 12) / 9), (0.88571, 0.66429)),
    ("a bcx dy z", (1 / 3, 1 / 3), (5 / 9, 17 / 42), (0.73333, 0.55)),
    ("a bcxB dy z", (1 / 3, 1 / 4), (5 / 9, 2.5 / 8), (0.68889, 0.51667)),
    ("a bcx dy Bz", (1 / 3, 1 / 4), (5 / 9, 17 / 48), (0.73333, 0.55)),
    ("a b c d e f", (0, 0), (3 / 6, 1), None),
    ("abcdef", (1, 3 / 5), (1, 14 / 36), None),
]


@pytest.mark.parametrize(("response", "muc", "b_cubed", "ceaf"), PUBLISHED)
def test_figures_of_the_reference_scorer(response, muc, b_cubed, ceaf) -> None:
    found = coreference_scores([["a", "bc", "def"]], [response.split()])
    for name, expected in (("muc", muc), ("b_cubed", b_cubed), ("ceaf", ceaf)):
        if expected is not None:
            assert (found[f"{name}_recall"], found[f"{name}_precision"]) == pytest.approx(expected, abs=1e-5)
    assert found["f1"] == pytest.approx(sum(found[f"{name}_f1"] for name in ("muc", "b_cubed", "ceaf")) / 3)
    mentions = set(response) - {" "}
    assert found["mention_precision"] == pytest.approx(len(mentions & set("abcdef")) / len(mentions))


def test_counts_are_summed_over_documents() -> None:
    """Two documents count as one that holds both."""
    gold, other = [["ab", "cde"], ["fg"]], [["abc", "de"], ["fx", "gy"]]
    together = coreference_scores([sum(gold, [])], [sum(other, [])])
    assert coreference_scores(gold, other) == pytest.approx(together)
    with pytest.raises(ValueError, match="document 0 of predicted has a mention twice"):
        coreference_scores([["ab"]], [["ab", "bc"]])
    with pytest.raises(ValueError, match="predicted has 1 documents; expected 2"):
        coreference_scores(gold, other[:1])


def test_pairs_are_the_best_of_all() -> None:
    draw = random.Random(0)
    for rows, columns in itertools.product(range(1, 5), range(1, 6)):
        if rows <= columns:
            values = [[draw.choice([0.0, draw.random()]) for _ in range(columns)] for _ in range(rows)]
            found = best_pairs(values)
            assert len(set(found)) == rows
            every = (sum(map(list.__getitem__, values, way)) for way in itertools.permutations(range(columns), rows))
            assert sum(map(list.__getitem__, values, found)) == pytest.approx(max(every))


def scorer(x, w, name):
    for layer in (0, 3):
        x = np.maximum(w[f"{name}.{layer}.weight"] @ x + w[f"{name}.{layer}.bias"], 0)
    return (w[f"{name}.6.weight"] @ x + w[f"{name}.6.bias"])[0]


def resolved(vectors, states, sentences, speakers, gold, head):
    """Kept spans, antecedents and losses of a document, span by span and pair by pair."""
    w = {name: value.double().numpy() for name, value in head.state_dict().items()}
    count = len(vectors)
    candidates = []
    for first, last in itertools.combinations_with_replacement(range(count), 2):
        if last - first < head.max_span and sentences[first] == sentences[last]:
            a = np.exp([scorer(states[t], w, "head_scores") for t in range(first, last + 1)])
            heads = a / a.sum() @ vectors[first : last + 1]
            g = np.concatenate([states[first], states[last], heads, w["widths.weight"][last - first]])
            candidates.append((scorer(g, w, "mention_scores"), (first, last), g))
    kept = []
    for one in sorted(candidates, key=lambda candidate: -candidate[0]):
        (a, b) = one[1]
        crosses = any(c < a <= d < b or a < c <= b < d for _, (c, d), _ in kept)
        if not crosses and len(kept) < int(head.spans_per_word * count):
            kept.append(one)
    kept.sort(key=lambda one: one[1])
    cluster = {(first, last): number for first, last, number in gold}
    antecedents, losses = [], []
    for i, (s_i, span, g) in enumerate(kept):
        rough = [s_i + s_j + g_j @ w["coarse.weight"] @ g for s_j, _, g_j in kept[:i]]
        scores = {}
        for j in sorted(range(i), key=lambda j: -rough[j])[: head.antecedents]:
            bucket = sum(i - j >= begin for begin in (2, 3, 4, 5, 8, 16, 32, 64))
            is_same = int(speakers[sentences[span[0]]] == speakers[sentences[kept[j][1][0]]])
            pair = [g, kept[j][2], g * kept[j][2], w["distances.weight"][bucket], w["speakers.weight"][is_same]]
            scores[j] = rough[j] + scorer(np.concatenate(pair), w, "pair_scores")
        scores[-1] = 0.0
        best = max(scores, key=scores.get)
        right = [j for j in scores if j >= 0 and span in cluster and cluster.get(kept[j][1]) == cluster[span]] or [-1]
        total = sum(np.exp(value) for value in scores.values())
        antecedents.append(best)
        losses.append(-np.log(sum(np.exp(scores[j]) for j in right) / total))
    return [list(span) for _, span, _ in kept], antecedents, losses


def test_the_resolver_against_its_equations() -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 3, "max_span": 3, "spans_per_word": 0.9, "antecedents": 2}
    head = CoreferenceResolver(Sources(1, 4), **sizes).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    lengths, documents = torch.tensor([4, 3, 1, 5]), [2, 1, 1]
    speakers = torch.tensor([0, 1, 0, 0])
    layers = torch.randn(4, 1, 5, 4) * (torch.arange(5) < lengths[:, None])[:, None, :, None]
    # {"0 to 1", "4", "6"} and {"2", "5 to 6"}, nothing, and one mention alone.
    gold = [[(0, 1, 0), (4, 4, 0), (6, 6, 0), (2, 2, 1), (5, 6, 1)], [], [(0, 0, 0)]]
    labels = [torch.tensor(own, dtype=torch.int64).reshape(-1, 3) for own in gold]
    with torch.no_grad():
        found = head(layers, lengths, documents, speakers, labels)
        states = [head.encoder(layers[k, :, : lengths[k]])[0][0].double().numpy() for k in range(4)]
    vectors = [layers[k, 0, : lengths[k]].double().numpy() for k in range(4)]
    losses, start = [], 0
    for number, count in enumerate(documents):
        own = range(start, start + count)
        sentences = [k - start for k in own for _ in range(lengths[k])]
        parts = (np.concatenate([side[k] for k in own]) for side in (vectors, states))
        spans, antecedents, some = resolved(*parts, sentences, speakers[start:].tolist(), gold[number], head)
        if number != 1:  # of one word: no span is less than one
            assert found.spans[number].tolist() == spans
            assert found.antecedents[number].tolist() == antecedents
        losses += some if number != 1 else [0.0]
        start += count
    assert found.loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert found.spans[1].tolist() == [[0, 0]] and found.antecedents[1].tolist() == [-1]
    assert any(place >= 0 for place in found.antecedents[0].tolist())


def test_chains_are_clusters() -> None:
    spans = [[0, 0], [1, 2], [3, 3], [4, 4], [5, 5]]
    assert clusters_of(spans, [-1, 0, -1, 1, -1]) == [[(0, 0), (1, 2), (4, 4)]]


NAMES = ("anna", "bob", "carl", "dora")


def documents(count, seed=0):
    """A name is the same person wherever it stands in a document; what comes once is no mention, as in OntoNotes."""
    draw, lines = random.Random(seed), []
    for number in range(count):
        pairs = [draw.sample(range(4), 2) for _ in range(3)]
        often = {k for k in range(4) if sum(k in pair for pair in pairs) > 1}
        lines.append(f"#begin document (d{number}); part 000")
        for pair in pairs:
            for k, word in zip((pair[0], None, pair[1], None), (NAMES[pair[0]], "met", NAMES[pair[1]], ".")):
                lines.append(f"d{number} 0 0 {word} X * - - - - * {f'({k})' if k in often else '-'}")
            lines.append("")
        lines.append("#end document")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("model", [None, "bert", "elmo"])
def test_a_stored_model_resolves_the_same(model, request, tmp_path) -> None:
    (tmp_path / "x").write_text(documents(3))
    examples = read_coreference(tmp_path / "x")
    encoder = None if model is None else request.getfixturevalue(model)
    words, features = {None: ("chars", None), "bert": ("", "mix"), "elmo": ("", None)}[model]
    choice = Choice(words=words, features=features, hidden_size=4, max_span=2, output_mix=model is not None)
    predictor = build("coref", encoder, (), choice)
    fine_tune = FineTune(predictor, examples, batch_size=2)
    fine_tune.loss(predictor.model, fine_tune.batch(0, 0, 1))[0].backward()
    fine_tune.save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.options == predictor.options
    assert again.predict(examples) == predictor.predict(examples)


def test_the_command_learns_who_is_who(tmp_path, capsys) -> None:
    for name, seed, count in (("train", 0, 30), ("dev", 1, 6)):
        (tmp_path / name).write_text(documents(count, seed))
    argv = ["finetune", "coref", "--words", "chars", "--lstm-hidden", "8", "--max-span", "2", "--epochs", "3"]
    argv += ["--spans-per-word", "1", "--lr", "3e-3", "--dropout", "0", "--device", "cpu", "--quiet"]
    run, dev = tmp_path / "run", str(tmp_path / "dev")
    assert main([*argv, "--train", str(tmp_path / "train"), "--dev", dev, "-o", str(run)]) == 0
    scores = json.loads((run / "best" / "scores-dev.json").read_text())
    assert scores["f1"] >= 0.9
    lines = (run / "best" / "predictions-dev.jsonl").read_text().splitlines()
    assert len(lines) == 6 and set(json.loads(lines[0])) == {"document", "clusters", "texts"}
    argv = ["finetune", "coref", "-m", str(run / "best"), "--evaluate-only", "--test", dev, "--device", "cpu"]
    assert main([*argv, "-o", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "scores-test.json").read_text()) == pytest.approx(scores)


def test_what_cannot_be_is_refused(bert, tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="'coref' with all of BERT trained is not there"):
        build("coref", bert)
    path = tmp_path / "x"
    path.write_text(documents(1).replace("(0)", "-").replace("(1)", "-").replace("(2)", "-").replace("(3)", "-"))
    argv = ["finetune", "coref", "--words", "chars", "--train", str(path), "-o", str(tmp_path / "run")]
    assert main(argv) != 0
    assert "has no mentions" in capsys.readouterr().err
