# SPDX-License-Identifier: Apache-2.0
"""The modules ELMo is built of, each for itself."""

from __future__ import annotations

import pytest
import torch

from ctxfast._core import capability
from ctxfast.models.elmo.character_encoder import ElmoCharacterEncoder
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.tokenization import batch_to_ids
from ctxfast.nn.char_cnn import CharCnn
from ctxfast.nn.elmo_lstm import ElmoLstm
from ctxfast.nn.highway import Highway
from ctxfast.nn.scalar_mix import ScalarMix
from ctxfast.nn.words import unique_rows


def test_unique_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(0, 3, (200, 5))
    expected = torch.unique(rows, dim=0)
    distinct, inverse = unique_rows(rows)
    assert torch.equal(distinct[inverse], rows)
    assert torch.equal(torch.unique(distinct, dim=0), expected) and len(distinct) == len(expected)
    # Hashes that collide must not join rows.
    monkeypatch.setattr("ctxfast.nn.words._multipliers", lambda count: [1] * count)
    distinct, inverse = unique_rows(rows)
    assert torch.equal(distinct[inverse], rows) and len(distinct) == len(expected)


def test_highway() -> None:
    highway = Highway(5, 2).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = x
    for k in range(2):
        weight, bias = highway.state_dict()[f"_layers.{k}.weight"], highway.state_dict()[f"_layers.{k}.bias"]
        assert bias[5:].eq(1).all()
        both = expected @ weight.T + bias
        gate = 1 / (1 + torch.exp(-both[:, 5:]))
        expected = gate * expected + (1 - gate) * both[:, :5].clamp(min=0)
    torch.testing.assert_close(highway(x), expected)


def test_scalar_mix_module() -> None:
    mix = ScalarMix(2, initial_scalar_parameters=[0.0, 1.0])
    assert list(mix.state_dict()) == ["gamma", "scalar_parameters.0", "scalar_parameters.1"]
    layers = [torch.randn(2, 3, 4) for _ in range(2)]
    share = torch.softmax(torch.tensor([0.0, 1.0]), 0)
    torch.testing.assert_close(mix(layers), share[0] * layers[0] + share[1] * layers[1])
    halves = [layer.half() for layer in layers]
    normed = ScalarMix(2, do_layer_norm=True).half()(halves, torch.ones(2, 3, dtype=torch.bool))
    assert normed.dtype == torch.float16 and normed.isfinite().all()


def lstm(**kwargs) -> ElmoLstm:
    return ElmoLstm(
        4, 4, 6, 2, requires_grad=True, state_projection_clip_value=0.2, memory_cell_clip_value=0.5, **kwargs
    )


def test_lstm_state_in_and_out() -> None:
    model = lstm().double()
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    start = torch.randn(2, 2, 3, 4).double().clamp(-0.2, 0.2), torch.randn(2, 2, 3, 6).double().clamp(-0.5, 0.5)
    lengths = torch.tensor([8, 0, 3])
    layers, (h, c) = model(x, lengths, start)
    assert layers.shape == (2, 3, 8, 8)
    for t, k in [(8, 0), (0, 1), (3, 2)]:
        assert not layers[:, k, t:].any()
    assert torch.equal(h[:, :, 1], start[0][:, :, 1]) and torch.equal(c[:, :, 1], start[1][:, :, 1])
    # Layer 0, forward: the last output is the state; in two pieces with the state between, the same.
    torch.testing.assert_close(h[0, 0, 2], layers[0, 2, 2, :4])
    first, state = model(x[:, :5], None, start)
    second, _ = model(x[:, 5:], None, (state[0], state[1]))
    whole, _ = model(x, None, start)
    torch.testing.assert_close(torch.cat([first, second], 2)[0, :, :, :4], whole[0, :, :, :4])


def test_recurrent_dropout_equals_the_kernel_when_nothing_is_dropped() -> None:
    plain, dropping = lstm(), lstm(recurrent_dropout_probability=1e-9)
    dropping.load_state_dict(plain.state_dict())
    x, lengths = torch.randn(3, 7, 4), torch.tensor([7, 2, 5])
    start = 0.1 * torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 6)
    for found, expected in zip(dropping(x, lengths, start)[1], plain(x, lengths, start)[1]):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dropping(x, lengths, start)[0], plain(x, lengths, start)[0])
    torch.testing.assert_close(dropping(x)[0], plain(x)[0])


def test_recurrent_dropout_drops_the_same_elements_at_every_step() -> None:
    model = lstm(recurrent_dropout_probability=0.5, use_skip_connections=False)
    x = torch.randn(4, 9, 4)
    layers, (h, _) = model(x)
    dropped = layers == 0  # (L, B, T, 2P)
    assert torch.equal(dropped.all(2), dropped.any(2))
    assert 0.2 < float(dropped.float().mean()) < 0.8
    assert torch.equal(h[0, 0] == 0, dropped[0, :, 0, :4])
    assert float(layers.detach().abs().max()) <= 0.4 + 1e-6  # a clipped value, doubled
    layers.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model.eval()(x)[0], model.eval()(x)[0])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_char_cnn(activation: str) -> None:
    cnn = CharCnn(9, 3, [(1, 2), (4, 5)], activation).double()
    assert sorted(cnn.state_dict()) == [
        "_char_embedding_weights",
        *(f"char_conv_{i}.{kind}" for i in range(2) for kind in ("bias", "weight")),
    ]
    assert not cnn._char_embedding_weights[0].any() and cnn.num_filters == 7
    ids = torch.randint(0, 9, (6, 8))
    found, expected = cnn(ids), []
    for conv in cnn.convolutions():
        windows = cnn._char_embedding_weights[ids].unfold(1, conv.kernel_size[0], 1)  # (W, windows, D, width)
        best = (torch.einsum("wtdk,ndk->wtn", windows, conv.weight) + conv.bias).amax(1)
        expected.append(getattr(torch, activation)(best))
    torch.testing.assert_close(found, torch.cat(expected, 1))


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)), 4])
@pytest.mark.parametrize("impl", [None, "reference"])
def test_a_words_vector_does_not_depend_on_the_others(
    impl: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as wide as a public model; words are filled up to a fixed number only where products need that."""
    encoder = ElmoCharacterEncoder(ElmoConfig.preset("small"), impl=impl).eval()
    words = batch_to_ids([[f"{n:x}" * (1 + n % 9) for n in range(150)]])[0]
    counts, plain = [], encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda part: counts.append(len(part)) or plain(part))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = encoder.encode(words, batch_invariant=True)
        for first, count in [(0, 1), (7, 2), (30, 34), (3, 64), (100, 50), (1, 149)]:
            part = encoder.encode(words[first : first + count], batch_invariant=True)
            assert torch.equal(part, whole[first : first + count]), (first, count)
    finally:
        torch.set_num_threads(before)
    is_filled = impl == "reference" or capability.extension() is None
    assert set(counts) == {64} if is_filled else counts == [150, 1, 2, 34, 64, 50, 149]
