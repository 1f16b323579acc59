# SPDX-License-Identifier: Apache-2.0
"""``Elmo`` in use: AllenNLP's rules, cached vocabularies, torch.compile, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.elmo_models import LINES, SMALL, write_model

import ctxfast
from ctxfast.models.elmo.modeling import Elmo, ElmoBiLm
from ctxfast.models.elmo.tokenization import batch_to_ids
from ctxfast.nn.elmo_lstm import ElmoLstm
from ctxfast.nn.scalar_mix import ScalarMix


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_model(tmp_path)


def test_names_of_the_state_dict(files: tuple[Path, Path]) -> None:
    expected = ["_elmo_lstm._token_embedder._char_embedding_weights"]
    expected += [f"_elmo_lstm._token_embedder.char_conv_{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    expected += [
        f"_elmo_lstm._token_embedder.{part}.{kind}"
        for part in ("_highways._layers.0", "_highways._layers.1", "_projection")
        for kind in ("weight", "bias")
    ]
    expected += [
        f"_elmo_lstm._elmo_lstm.{side}_layer_{layer}.{name}"
        for layer in range(2)
        for side in ("forward", "backward")
        for name in (
            "input_linearity.weight",
            "state_linearity.weight",
            "state_linearity.bias",
            "state_projection.weight",
        )
    ]
    expected += [
        f"scalar_mix_{k}.{name}" for k in range(2) for name in [*(f"scalar_parameters.{i}" for i in range(3)), "gamma"]
    ]
    elmo = Elmo(*files, 2, state="steady")
    elmo(batch_to_ids(LINES))  # states come into being
    assert sorted(elmo.state_dict()) == sorted(expected)
    other = Elmo.from_config(SMALL, 2, seed=5)
    other.load_state_dict(elmo.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in elmo.state_dict().items())


@torch.no_grad()
def test_shapes_masks_and_zeros(files: tuple[Path, Path]) -> None:
    ids = batch_to_ids(LINES)
    for keep in (False, True):
        elmo = Elmo(*files, 2, dropout=0.0, keep_sentence_boundaries=keep, state="zero")
        found = elmo(ids)
        lengths = [len(line) + 2 * keep for line in LINES]
        assert found["mask"].dtype == torch.bool and found["mask"].sum(1).tolist() == lengths
        assert elmo.get_output_dim() == 12
        for mixed in found["elmo_representations"]:
            assert mixed.shape == (5, 7 + 2 * keep, 12)
            for k, length in enumerate(lengths):
                assert mixed[k, :length].abs().sum(-1).all() and not mixed[k, length:].any()
    without = Elmo(*files, 1, dropout=0.0, state="zero")(ids)["elmo_representations"][0]
    for k, line in enumerate(LINES):
        assert torch.equal(mixed[k, 1 : len(line) + 1], without[k, : len(line)])


@torch.no_grad()
@pytest.mark.parametrize("keep", [False, True])
def test_leading_dimensions(files: tuple[Path, Path], keep: bool) -> None:
    elmo = Elmo(*files, 1, dropout=0.0, keep_sentence_boundaries=keep, state="zero")
    flat = batch_to_ids([*LINES, LINES[0]])
    found, expected = elmo(flat.view(2, 3, *flat.shape[1:])), elmo(flat)
    mixed = expected["elmo_representations"][0]
    assert torch.equal(found["elmo_representations"][0], mixed.view(2, 3, *mixed.shape[1:]))
    assert torch.equal(found["mask"], expected["mask"].view(2, 3, -1))
    assert elmo(flat.view(1, 2, 3, *flat.shape[1:]))["mask"].shape == (1, 2, 3, 7 + 2 * keep)


@torch.no_grad()
def test_mixes_are_independent_and_exact(files: tuple[Path, Path]) -> None:
    elmo = Elmo(*files, 2, dropout=0.0, state="zero")
    weights = torch.tensor([0.5, -1.0, 2.0])
    for parameter, value in zip(elmo.scalar_mix_1.scalar_parameters, weights):
        parameter.fill_(value)
    elmo.scalar_mix_1.gamma.fill_(3.0)
    ids = batch_to_ids(LINES[:1])
    layers = torch.stack(elmo._elmo_lstm(ids)["activations"])[:, :, 1:-1]
    first, second = elmo(ids)["elmo_representations"]
    torch.testing.assert_close(first, layers.mean(0))
    torch.testing.assert_close(second, 3 * (torch.softmax(weights, 0)[:, None, None, None] * layers).sum(0))


@torch.no_grad()
@pytest.mark.parametrize("keep", [False, True])
def test_layer_norm_is_over_the_whole_batch(files: tuple[Path, Path], keep: bool) -> None:
    elmo = Elmo(*files, 1, do_layer_norm=True, dropout=0.0, state="zero", keep_sentence_boundaries=keep).double()
    ids = batch_to_ids(LINES)
    found = elmo._elmo_lstm(ids)
    mask = found["mask"]
    expected = 0
    for layer in found["activations"]:
        inside = layer[mask]  # with the sentence marks, as AllenNLP counts
        expected = expected + (layer - inside.mean()) / (inside.var(correction=0) + 1e-13).sqrt() / 3
    mixed = elmo(ids)["elmo_representations"][0]
    if keep:
        torch.testing.assert_close(mixed[mask], expected[mask], atol=1e-12, rtol=1e-12)
        return
    for k, line in enumerate(LINES):
        torch.testing.assert_close(mixed[k, : len(line)], expected[k, 1 : len(line) + 1], atol=1e-12, rtol=1e-12)
        assert not mixed[k, len(line) :].any()


def test_given_mix_parameters_are_frozen(files: tuple[Path, Path]) -> None:
    elmo = Elmo(*files, 1, scalar_mix_parameters=[1.0, 2.0, 3.0])
    mix = elmo.scalar_mix_0
    assert [float(p) for p in mix.scalar_parameters] == [1.0, 2.0, 3.0]
    assert not any(p.requires_grad for p in mix.parameters())


@torch.no_grad()
def test_dropout_is_for_training_only(files: tuple[Path, Path]) -> None:
    elmo = Elmo(*files, 1, dropout=0.5, state="zero")
    ids = batch_to_ids(LINES[:1])
    trained, plain = elmo(ids)["elmo_representations"][0], elmo.eval()(ids)["elmo_representations"][0]
    dropped = trained == 0
    assert 0.2 < float(dropped.float().mean()) < 0.8
    torch.testing.assert_close(trained[~dropped], 2 * plain[~dropped])


@torch.no_grad()
def test_any_language_model_as_module() -> None:
    class Fake(torch.nn.Module):
        num_layers = 2

        def get_output_dim(self) -> int:
            return 4

        def forward(self, inputs: torch.Tensor, word_inputs: torch.Tensor | None = None) -> dict:
            mask = torch.ones(inputs.shape[0], inputs.shape[1] + 2, dtype=torch.bool)
            layer = torch.arange(inputs.shape[1] + 2.0)[None, :, None].expand(*mask.shape, 4)
            return {"activations": [layer, 3 * layer], "mask": mask}

    elmo = Elmo(num_output_representations=1, dropout=0.0, module=Fake())
    assert elmo(torch.ones(1, 3, 50, dtype=torch.int64))["elmo_representations"][0][0, :, 0].tolist() == [2, 4, 6]
    with pytest.raises(TypeError, match="reset_states needs ctxfast's own language model; module is a Fake"):
        elmo.reset_states()


# Cached vocabulary


WORDS = ["@@PADDING@@", "@@UNKNOWN@@", "the", "cat", "sat", "on", "mat", "."]


@torch.no_grad()
def test_cached_vocabulary(files: tuple[Path, Path]) -> None:
    plain = Elmo(*files, 1, dropout=0.0)
    cached = Elmo(*files, 1, dropout=0.0, vocab_to_cache=WORDS)
    assert "_elmo_lstm._word_embedding.weight" in cached.state_dict()
    assert not cached.state_dict()["_elmo_lstm._word_embedding.weight"][0].any()
    sentences = [["the", "cat", "sat", "on", "the", "mat", "."], ["the", "@@UNKNOWN@@"], []]
    ids = batch_to_ids(sentences)
    index = torch.zeros(3, 7, dtype=torch.int64)
    for b, sentence in enumerate(sentences):
        for t, word in enumerate(sentence):
            index[b, t] = WORDS.index(word)
    for chars in (ids, None, ids):  # states are carried alike
        found, expected = cached(chars, index), plain(ids)
        assert torch.equal(found["mask"], expected["mask"])
        torch.testing.assert_close(
            found["elmo_representations"][0], expected["elmo_representations"][0], atol=1e-6, rtol=1e-5
        )
    four = cached(ids[None], index[None])
    assert four["elmo_representations"][0].shape == (1, 3, 7, 12)


@torch.no_grad()
def test_words_outside_the_cached_vocabulary(files: tuple[Path, Path]) -> None:
    plain, cached = Elmo(*files, 1, dropout=0.0), Elmo(*files, 1, dropout=0.0, vocab_to_cache=WORDS)
    ids = batch_to_ids([["the", "dog", "sat"], ["dogs", "on"]])
    index = torch.tensor([[2, 8, 4], [99, 5, 0]])
    torch.testing.assert_close(
        cached(ids, index)["elmo_representations"][0], plain(ids)["elmo_representations"][0], atol=1e-6, rtol=1e-5
    )
    with pytest.raises(ValueError, match="word_inputs holds 99, outside the cached vocabulary of 8 words"):
        cached(None, index)


def test_cached_vocabulary_that_is_trained(files: tuple[Path, Path]) -> None:
    with pytest.warns(UserWarning, match="requires_grad is set and a vocabulary is cached"):
        elmo = Elmo(*files, 1, requires_grad=True, dropout=0.0, vocab_to_cache=WORDS)
    elmo(batch_to_ids([["cat", "dog"]]), torch.tensor([[3, 9]]))["elmo_representations"][0].sum().backward()
    table = elmo._elmo_lstm._word_embedding.weight.grad
    assert table.abs().sum(1).nonzero().flatten().tolist() == [3]
    assert elmo._elmo_lstm._token_embedder._char_embedding_weights.grad[101].abs().sum() > 0  # "d"


def test_word_ids_without_a_cached_vocabulary_are_not_used(files: tuple[Path, Path]) -> None:
    elmo = Elmo(*files, 1, dropout=0.0, state="zero")
    ids = batch_to_ids([["a", "b"]])
    with pytest.warns(UserWarning, match="word_inputs was given without a cached vocabulary"):
        found = elmo(ids, torch.tensor([[1, 2]]))
    assert torch.equal(found["elmo_representations"][0], elmo(ids)["elmo_representations"][0])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("state", [*(pytest.param(s, marks=pytest.mark.slow) for s in ("zero", "steady")), "carry"])
def test_compiles_into_one_graph(files: tuple[Path, Path], state: str) -> None:
    elmo, plain = (Elmo(*files, 1, dropout=0.0, state=state) for _ in range(2))
    elmo.calibrate()  # a first call that calibrates cannot be traced
    compiled = torch.compile(elmo, fullgraph=True, backend="aot_eager")
    for lines in (LINES, LINES[::-1], LINES[:3]):
        ids = batch_to_ids(lines)
        found, expected = compiled(ids), plain(ids)
        torch.testing.assert_close(found["elmo_representations"], expected["elmo_representations"])


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.004), (torch.int8, 0.012)], ids=str)
def test_products_in_fewer_bits(files: tuple[Path, Path], dtype: torch.dtype, allowed: float) -> None:
    """What rounding costs: 0.1 % and 0.3 % of the vectors' root mean square in AllenNLP's test model."""
    ids = batch_to_ids(LINES)
    exact = Elmo(*files, 1, dropout=0.0, state="zero")(ids)["elmo_representations"][0]
    rounded = Elmo(*files, 1, dropout=0.0, state="zero", weight_dtype=dtype)(ids)["elmo_representations"][0]
    error = float((exact - rounded).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0 < error < allowed


def test_exported_names() -> None:
    assert ctxfast.Elmo is Elmo and ctxfast.batch_to_ids is batch_to_ids


@torch.no_grad()
def test_exports_with_any_batch_size(files: tuple[Path, Path]) -> None:
    elmo, ids = Elmo(*files, 1, dropout=0.0, state="zero").eval(), batch_to_ids(LINES)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(elmo, (ids,), dynamic_shapes=({0: batch},))
    for lines in (LINES, LINES[3:]):
        ids = torch.cat([batch_to_ids(lines), torch.zeros(len(lines), 7, 50, dtype=torch.int64)], 1)[:, :7]
        found, expected = program.module()(ids), elmo(ids)
        torch.testing.assert_close(found["elmo_representations"], expected["elmo_representations"])


@torch.no_grad()
@pytest.mark.parametrize("state", ["carry", "steady", "zero"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_lower_precision(files: tuple[Path, Path], state: str, dtype: torch.dtype, tolerance: float) -> None:
    ids = batch_to_ids(LINES)
    plain, low, casting = (Elmo(*files, 1, dropout=0.0, state=state) for _ in range(3))
    low.to(dtype)
    for elmo in (plain, low, casting):
        elmo.calibrate(LINES)
    for _ in range(2):
        expected = plain(ids)["elmo_representations"][0]
        found = [low(ids)["elmo_representations"][0]]
        with torch.autocast("cpu", dtype=dtype):
            found.append(casting(ids)["elmo_representations"][0])
        for mixed in found:
            assert mixed.dtype == dtype
            torch.testing.assert_close(mixed.float(), expected, atol=tolerance, rtol=0)
    # States stay in the parameters' precision, whatever autocast does.
    for kept in (casting._elmo_lstm._carried.h, casting._elmo_lstm._steady.h):
        assert kept is None or kept.dtype == torch.float32


_IDS = batch_to_ids([["a", "b"]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda o, w: Elmo(o, w, 1, state="fresh"),
            ValueError,
            "ctxfast.Elmo: state is 'fresh'; expected one of carry, steady, zero.",
        ),
        (
            lambda o, w: Elmo(o, None, 1),
            ValueError,
            "ctxfast.Elmo: weight_file is None; expected a path, or a language model as module.",
        ),
        (
            lambda o, w: Elmo("o.json", None, 1, module=torch.nn.Identity()),
            ValueError,
            "ctxfast.Elmo: options_file is 'o.json'; expected None together with module.",
        ),
        (
            lambda o, w: Elmo(None, None, 1, module=torch.nn.Identity(), state="zero"),
            ValueError,
            "ctxfast.Elmo: state and weight_dtype belong to the language model; expected them to be set where module "
            "was made, not here.",
        ),
        (
            lambda o, w: Elmo(o, w, 1, scalar_mix_parameters=[0.0, 1.0]),
            ValueError,
            "ctxfast.ScalarMix: initial_scalar_parameters has 2 values; expected 3, one per layer.",
        ),
        (
            lambda o, w: Elmo(o, w, 1)([["a", "b"]]),
            TypeError,
            "ctxfast.Elmo: inputs is a list; expected a torch.Tensor. batch_to_ids makes it.",
        ),
        (
            lambda o, w: Elmo(o, w, 1)(_IDS.float()),
            TypeError,
            "ctxfast.Elmo: inputs has dtype torch.float32; expected int64 ids, as batch_to_ids makes.",
        ),
        (
            lambda o, w: Elmo(o, w, 1)(_IDS[0]),
            ValueError,
            "ctxfast.Elmo: inputs has shape (2, 50); expected (batch, tokens, characters), or more leading dimensions.",
        ),
        (
            lambda o, w: Elmo(o, w, 1)(_IDS[:, :, :20]),
            ValueError,
            "ctxfast.Elmo: inputs has shape (1, 2, 20); expected (batch, tokens, characters) = (any, any, 50). "
            "batch_to_ids(sentences, max_characters=50) makes it.",
        ),
        (
            lambda o, w: Elmo(o, w, 1)(torch.cat([0 * _IDS, _IDS], 1)),
            ValueError,
            "ctxfast.Elmo: inputs has zeros before a token; expected padding at the end of a sentence only.",
        ),
        (
            lambda o, w: Elmo(o, w, 1)(_IDS + 200),
            ValueError,
            "ctxfast.char_cnn: char_ids holds 461; expected values in 0..261. These are the rows of char_embeddings.",
        ),
        (
            lambda o, w: Elmo(o, w, 1)(None),
            ValueError,
            "ctxfast.Elmo: inputs is None; expected character ids, or word_inputs.",
        ),
        (
            lambda o, w: ElmoBiLm.from_files(o, w)(_IDS, torch.ones(1, 2, dtype=torch.int64)),
            ValueError,
            "ctxfast.Elmo: word_inputs was given; expected None without a cached vocabulary. Pass vocab_to_cache.",
        ),
        (
            lambda o, w: Elmo(o, w, 1, vocab_to_cache=WORDS)(_IDS, torch.ones(1, 3, dtype=torch.int64)),
            ValueError,
            "ctxfast.Elmo: word_inputs has shape (1, 3); expected (batch, tokens) = (1, 2), as inputs.",
        ),
        (
            lambda o, w: Elmo(o, w, 1, impl="cuda_step")(_IDS),
            ValueError,
            "ctxfast.char_cnn: impl is 'cuda_step'; expected one of ",
        ),
        (
            lambda o, w: ScalarMix(2)([torch.zeros(1, 2)]),
            ValueError,
            "ctxfast.ScalarMix: tensors holds 1 layers; expected 2, the module's mixture_size.",
        ),
        (
            lambda o, w: ElmoLstm(4, 4, 6, 1, has_projection=False),
            ValueError,
            "ctxfast.ElmoLstm: hidden_size is 4; expected cell_size 6 without a projection.",
        ),
        (
            lambda o, w: ElmoLstm(4, 4, 6, 1, recurrent_dropout_probability=1.0),
            ValueError,
            "ctxfast.ElmoLstm: recurrent_dropout_probability is 1.0; expected a probability, 0 <= p < 1.",
        ),
        (
            lambda o, w: ElmoLstm(4, 4, 6, 2)(
                torch.zeros(2, 3, 4), None, (torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 6))
            ),
            ValueError,
            "ctxfast.ElmoLstm: initial_state h has shape (2, 2, 1, 4); expected (layers, 2, batch, size) = "
            "(2, 2, 2, 4).",
        ),
        (
            lambda o, w: ElmoLstm(4, 4, 6, 2, recurrent_dropout_probability=0.1, weight_dtype=torch.bfloat16)(
                torch.zeros(2, 3, 4)
            ),
            ValueError,
            "ctxfast.ElmoLstm: weight_dtype is set; expected None while recurrent dropout is on, which runs the plain "
            "definition. Call .eval(), or leave one of them out.",
        ),
    ],
)
def test_errors(files: tuple[Path, Path], call, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call(*files)
    assert str(caught.value).startswith(message)
