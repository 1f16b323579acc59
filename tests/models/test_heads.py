# SPDX-License-Identifier: Apache-2.0
"""The heads of the papers, each against a second writing of its equations, word by word and gate by gate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ctxfast.models.heads.bcn import BiattentiveClassifier
from ctxfast.models.heads.bidaf import BiDaf
from ctxfast.models.heads.esim import Esim
from ctxfast.models.heads.highway_lstm import HighwayLstm, HighwayTagger
from ctxfast.models.heads.sequences import VariationalDropout
from ctxfast.models.token_vectors import Sources

SOURCES = Sources(2, 3, output_mix=True)
TAGS = ("O", "B-A0", "I-A0", "B-A1", "I-A1")


def arrays(module):
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


def relu(x):
    return np.maximum(x, 0)


def mix(layers, w, name):
    """(K, T, N) -> (T, N)."""
    shares = softmax([w[f"{name}.scalar_parameters.{k}"][0] for k in range(len(layers))])
    return w[f"{name}.gamma"][0] * sum(share * layer for share, layer in zip(shares, layers))


def bilstm(x, w, name):
    """One layer, both directions: gates in the order i, f, g, o."""
    sides = []
    for suffix, rows in (("", x), ("_reverse", x[::-1])):
        one, two = (w[f"{name}.{kind}_l0{suffix}"] for kind in ("weight_ih", "weight_hh"))
        bias = w[f"{name}.bias_ih_l0{suffix}"] + w[f"{name}.bias_hh_l0{suffix}"]
        h = c = np.zeros(two.shape[1])
        found = []
        for row in rows:
            i, f, g, o = np.split(one @ row + two @ h + bias, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            found.append(h)
        sides.append(found if not suffix else found[::-1])
    return np.concatenate([np.array(side) for side in sides], 1)


def dense(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def made(module):
    """With random weights everywhere: also where they start at 0, or at equal shares."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.eval()


def inputs(lengths, seed=0):
    """Layers, zeros past a text's end, and lengths."""
    torch.manual_seed(seed)
    lengths = torch.tensor(lengths)
    layers = torch.randn(len(lengths), 2, int(lengths.max()), 3)
    return layers * (torch.arange(layers.shape[2]) < lengths[:, None])[:, None, :, None], lengths


def of(layers, lengths, k):
    return layers[k, :, : lengths[k]].double().numpy()


def bcn(layers, w):
    hidden = relu(dense(mix(layers, w, "reader.mix"), w, "dense"))
    x = bilstm(hidden, w, "encoder")
    found = np.array([sum(a * v for a, v in zip(softmax([word @ v for v in x]), x)) for word in x])
    y = bilstm(np.concatenate([x, x - found, x * found], 1), w, "integrator")
    y = np.concatenate([y, mix(layers, w, "reader.output_mix")], 1)
    own = sum(a * v for a, v in zip(softmax(dense(y, w, "attention")[:, 0]), y))
    text = np.concatenate([y.max(0), y.min(0), y.mean(0), own])
    for k in range(3):
        pools = dense(text, w, f"outputs.{k}")
        text = np.array([pools[4 * unit : 4 * unit + 4].max() for unit in range(len(pools) // 4)])
    return text


def esim(one, other, w):
    sides = [
        np.concatenate([bilstm(mix(side, w, "reader.mix"), w, "encoder"), mix(side, w, "reader.output_mix")], 1)
        for side in (one, other)
    ]
    parts = []
    for x, y in (sides, sides[::-1]):
        found = np.array([sum(a * v for a, v in zip(softmax([word @ v for v in y]), y)) for word in x])
        composed = bilstm(relu(dense(np.concatenate([x, found, x - found, x * found], 1), w, "compare")), w, "composer")
        parts += [composed.mean(0), composed.max(0)]
    return dense(relu(dense(np.concatenate(parts), w, "dense")), w, "classifier")


def bidaf(text, question, w):
    h, q = (
        np.concatenate([bilstm(mix(side, w, "reader.mix"), w, "encoder"), mix(side, w, "reader.output_mix")], 1)
        for side in (text, question)
    )

    def score(name, x, y):
        u, v, product = w[f"{name}.weight"]
        return u @ x + v @ y + product @ (x * y)

    a = np.array([[score("attention", x, y) for y in q] for x in h])
    c = np.array([softmax(row) @ q for row in a])
    b = softmax(a.max(1)) @ h
    x = relu(dense(np.concatenate([h, c, h * c, b * c], 1), w, "merge"))
    z = bilstm(x, w, "modeler")
    s = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        weights = softmax([score("self_attention", z[i], z[j]) for j in others])
        s.append(sum(weight * z[j] for weight, j in zip(weights, others)))
    s = np.array(s)
    y = x + relu(dense(np.concatenate([z, s, z * s], 1), w, "self_merge"))
    starts = bilstm(y, w, "starter")
    ends = bilstm(np.concatenate([y, starts], 1), w, "ender")
    none = dense(np.concatenate([starts.max(0), ends.max(0)]), w, "no_answer")
    return [
        np.concatenate([[none[k]], dense(x, w, n)[:, 0]]) for k, (n, x) in enumerate((("start", starts), ("end", ends)))
    ]


def highway(x, w, name, is_backward):
    u, state, bias = (w[f"{name}.{part}"] for part in ("input.weight", "state.weight", "state.bias"))
    size = state.shape[1]
    h = c = np.zeros(size)
    found = [None] * len(x)
    for t in reversed(range(len(x))) if is_backward else range(len(x)):
        read = u @ x[t]
        i, f, g, o, r = np.split(read[: 5 * size] + state @ h + bias, 5)
        c = sigmoid(i) * np.tanh(g) + sigmoid(f) * c
        h = sigmoid(r) * sigmoid(o) * np.tanh(c) + (1 - sigmoid(r)) * read[5 * size :]
        found[t] = h
    return np.array(found)


def test_bcn() -> None:
    head = made(BiattentiveClassifier(SOURCES, 3, hidden_size=4))
    layers, lengths = inputs([5, 2, 1])
    found = head(layers, lengths).logits.detach().numpy()
    for k in range(3):
        assert np.allclose(found[k], bcn(of(layers, lengths, k), arrays(head)), atol=1e-4)


def test_esim() -> None:
    head = made(Esim(SOURCES, 3, hidden_size=4))
    layers, lengths = inputs([5, 2, 3, 4])
    found = head(layers, lengths).logits.detach().numpy()
    for k in range(2):
        one, other = of(layers, lengths, k), of(layers, lengths, k + 2)
        assert np.allclose(found[k], esim(one, other, arrays(head)), atol=1e-4)


def test_bidaf() -> None:
    head = made(BiDaf(SOURCES, hidden_size=4))
    layers, lengths = inputs([5, 3, 2, 4])
    found = head(layers, lengths)
    for k in range(2):
        expected = bidaf(of(layers, lengths, k), of(layers, lengths, k + 2), arrays(head))
        for side, logits in zip((found.start_logits, found.end_logits), expected):
            assert np.allclose(side[k, : len(logits)].detach(), logits, atol=1e-4)
            assert (side[k, len(logits) :] < -1e30).all()


def test_highway_lstms() -> None:
    head = made(HighwayTagger(SOURCES, TAGS, hidden_size=4, lstm_layers=3, marks_predicate=True))
    layers, lengths = inputs([5, 3])
    predicate = torch.tensor([[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    found = head(layers, lengths, predicate).logits.detach().numpy()
    w = arrays(head)
    for k in range(2):
        own = of(layers, lengths, k)
        x = np.concatenate([mix(own, w, "reader.mix"), w["predicate.weight"][predicate[k, : lengths[k]]]], 1)
        for layer in range(3):
            x = highway(x, w, f"lstms.{layer}", layer == 1)
        x = dense(np.concatenate([x, mix(own, w, "reader.output_mix")], 1), w, "classifier")
        assert np.allclose(found[k, : lengths[k]], x, atol=1e-4)


def test_a_highway_lstm_starts_as_the_papers_does() -> None:
    lstm = HighwayLstm(4, 4)
    for block in (*lstm.input.weight.split(4), *lstm.state.weight.split(4)):
        assert torch.allclose(block @ block.T, torch.eye(4), atol=1e-5)
    assert lstm.state.bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 12


def test_roles_obey_bio() -> None:
    """The likeliest of all sequences that may be, found by trying all."""
    head = HighwayTagger(Sources(1, 2), TAGS, hidden_size=2, lstm_layers=1)
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, 4, 5)
    shares = logits.log_softmax(-1)

    def may_be(sequence):
        before = ("O", *(TAGS[k] for k in sequence))
        return all(not TAGS[k].startswith("I") or other[1:] == TAGS[k][1:] for other, k in zip(before, sequence))

    for row, found in zip(shares, head.decode(logits, torch.tensor([4, 4, 4]))):
        allowed = [s for s in itertools.product(range(5), repeat=4) if may_be(s)]
        assert found == list(max(allowed, key=lambda s: sum(row[t, k].item() for t, k in enumerate(s))))
    assert not any(parameter.requires_grad for parameter in head.rules.parameters())


def test_one_mask_for_all_words() -> None:
    torch.manual_seed(0)
    x = torch.ones(2, 5, 40)
    found = VariationalDropout(0.5)(x)
    assert torch.equal(found, found[:, :1].expand_as(found)) and set(found.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(found[0], found[1])
    assert torch.equal(VariationalDropout(0.5).eval()(x), x)


@pytest.mark.parametrize("make", [BiattentiveClassifier, Esim, BiDaf, HighwayTagger])
def test_every_weight_learns(make) -> None:
    """No part of a head is left out of its loss, and the mixes' weights pay for their squares."""
    torch.manual_seed(0)
    own = {BiattentiveClassifier: (2,), Esim: (2,), BiDaf: (), HighwayTagger: (TAGS,)}[make]
    head = make(Sources(2, 3, True, 4, 5, mix_norm=True, mix_l2=0.5, output_mix=True), *own, hidden_size=6).train()
    layers, lengths = inputs([5, 3, 2, 4])
    words = {"characters": torch.randint(1, 260, (4, 5, 50)), "rows": torch.randint(0, 4, (4, 5))}
    labels = {
        BiattentiveClassifier: {"labels": torch.tensor([0, 1, 1, 0])},
        Esim: {"labels": torch.tensor([0, 1])},
        BiDaf: {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 0])},
        HighwayTagger: {"labels": torch.randint(0, 5, (4, 5))},
    }[make]
    head.reader.mix.scalar_parameters[0].data.fill_(2.0)
    loss = head(layers, lengths, words=words, **labels).loss
    assert loss.item() > 2.0  # 0.5 * 2 ** 2 of it
    loss.backward()
    still = [n for n, p in head.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []
