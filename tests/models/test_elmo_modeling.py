# SPDX-License-Identifier: Apache-2.0
"""ELMo's numbers: AllenNLP's fixtures, an independent numpy model, gradients."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from oracles.elmo_models import LINES, VARIANTS, fixture_layers, fixture_sentences, write_model, write_variant
from oracles.elmo_numpy import NumpyBiLm
from support import emulated

import ctxfast
from ctxfast._core import registry
from ctxfast.models.elmo.modeling import Elmo, ElmoBiLm
from ctxfast.models.elmo.tokenization import batch_to_ids


@pytest.fixture(scope="module")
def tiny(shared_data: Path) -> Path:
    return shared_data / "elmo" / "allennlp_tiny"


def tiny_model(folder: Path, **kwargs) -> ElmoBiLm:
    return ElmoBiLm.from_files(folder / "options.json", folder / "lm_weights.hdf5", **kwargs)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_model(tmp_path)


def top_error(got: torch.Tensor, expected: np.ndarray) -> float:
    """Checks at AllenNLP's own tolerance and returns the largest difference."""
    torch.testing.assert_close(got, torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
    return float((got - torch.from_numpy(expected)).abs().max())


# Fixtures of AllenNLP: the output of bilm-tf


@torch.no_grad()
@pytest.mark.parametrize("impl", [None, "reference"])
def test_fixture_lanes_as_batch_rows(tiny: Path, impl: str | None) -> None:
    model = tiny_model(tiny, impl=impl)
    lanes, expected = fixture_sentences(tiny), [fixture_layers(tiny, k) for k in range(3)]
    worst = 0.0
    for step in range(10):
        found = model(batch_to_ids([lane[step] for lane in lanes]))
        assert found["mask"].sum(1).tolist() == [len(lane[step]) + 2 for lane in lanes]
        for k, lane in enumerate(lanes):
            top = found["activations"][-1][k, 1 : len(lane[step]) + 1]
            worst = max(worst, top_error(top, expected[k][step]))
    assert worst < 2e-6


@pytest.mark.slow  # the emulator is compiled first, minutes
@torch.no_grad()
def test_fixture_through_the_step_kernels(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 on the emulator: the kernels a GPU would run, states carried from sentence to sentence."""
    cuda_step = registry.OPS["lstm"].module("cuda_step")
    monkeypatch.setattr(cuda_step, "supports", lambda args: None)
    model = tiny_model(tiny).half()
    lanes, expected = fixture_sentences(tiny), [fixture_layers(tiny, k) for k in range(3)]
    worst = largest = 0.0
    with emulated.kernels(monkeypatch, cuda_step, seed=1), ctxfast.use_impl(lstm="cuda_step"):
        for step in range(3):
            found = model(batch_to_ids([lane[step] for lane in lanes]))
            for k, lane in enumerate(lanes):
                top = found["activations"][-1][k, 1 : len(lane[step]) + 1].float()
                worst = max(worst, float((top - torch.from_numpy(expected[k][step])).abs().max()))
                largest = max(largest, float(abs(expected[k][step]).max()))
    # Values reach 4.6, where float16 itself rounds by up to 2e-3; the reference in float16 errs by 2.9e-3.
    assert 0 < worst < 1e-3 * largest


@torch.no_grad()
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_fixture_through_elmo_one_lane_at_a_time(tiny: Path, lane: int) -> None:
    elmo = Elmo(
        tiny / "options.json", tiny / "lm_weights.hdf5", 1, dropout=0.0, scalar_mix_parameters=[-1e9, -1e9, 0.0]
    )
    for sentence, expected in zip(fixture_sentences(tiny)[lane], fixture_layers(tiny, lane)):
        top_error(elmo(batch_to_ids([sentence]))["elmo_representations"][0][0], expected)


@torch.no_grad()
def test_token_vectors_of_the_fixture(tiny: Path) -> None:
    words = (tiny / "vocab_test.txt").read_text(encoding="utf-8").split("\n")[:458]
    with h5py.File(tiny / "elmo_token_embeddings.hdf5", "r") as file:
        expected = file["embedding"][...]
    model = tiny_model(tiny)
    top_error(model._token_embedder(batch_to_ids([words]))["token_embedding"][0, 1:-1], expected)
    layer = model(batch_to_ids([words]))["activations"][0][0, 1:-1]
    assert torch.equal(layer[:, :16], layer[:, 16:])
    top_error(layer[:, :16].contiguous(), expected)


# An independent model


def against_numpy(files: tuple[Path, Path], steps: list[list[list[str]]], tolerance: float) -> NumpyBiLm:
    """Every layer of several batches with carried states, in float64 closely and in float32."""
    oracle = NumpyBiLm(*files)
    states = [oracle.zero_state() for _ in steps[0]]
    exact, plain = ElmoBiLm.from_files(*files).double(), ElmoBiLm.from_files(*files)
    for batch in steps:
        ids = batch_to_ids(batch, max_characters=oracle.width)
        with torch.no_grad():
            doubles, singles = exact(ids), plain(ids)
        for k, sentence in enumerate(batch):
            expected = oracle.sentence(sentence, states[k])
            length = len(sentence) + 2
            assert doubles["mask"][k].tolist() == [t < length for t in range(ids.shape[1] + 2)]
            for layer, want in enumerate(expected):
                want = torch.from_numpy(want)
                found = doubles["activations"][layer][k]
                torch.testing.assert_close(found[:length], want, atol=1e-9, rtol=1e-9)
                assert not found[length:].any()
                found = singles["activations"][layer][k, :length].double()
                torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance)
    return oracle


@pytest.mark.parametrize("name", VARIANTS)
def test_models_of_every_kind_against_numpy(name: str, tmp_path: Path) -> None:
    oracle = against_numpy(write_variant(tmp_path, name), [LINES, LINES[::-1]], 1e-4)
    if name == "clips hit":
        assert oracle.cell_hits / oracle.cell_values > 0.05
        assert oracle.proj_hits / oracle.proj_values > 0.05


def test_second_fixture_against_numpy(shared_data: Path) -> None:
    folder = shared_data / "elmo" / "allennlp_tiny_fr"
    against_numpy((folder / "options.json", folder / "weights.hdf5"), [LINES, LINES[::-1]], 1e-5)


def test_numpy_model_reproduces_the_fixture(tiny: Path) -> None:
    oracle = NumpyBiLm(tiny / "options.json", tiny / "lm_weights.hdf5")
    state = oracle.zero_state()
    for sentence, expected in zip(fixture_sentences(tiny)[0][:4], fixture_layers(tiny, 0)):
        np.testing.assert_allclose(oracle.sentence(sentence, state)[-1][1:-1], expected, atol=1e-6, rtol=1e-5)


# Gradients


def gradients(model: Elmo, ids: torch.Tensor, steps: int = 2) -> dict[str, torch.Tensor]:
    for _ in range(steps):  # the second starts from a carried state, which passes no gradient
        mixed = model(ids)["elmo_representations"][0]
        factors = torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed)
        (mixed * factors).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_against_float64(tmp_path: Path) -> None:
    files = write_variant(tmp_path, "clips hit")
    ids = batch_to_ids(LINES)
    single = gradients(Elmo(*files, 1, requires_grad=True, dropout=0.0), ids)
    double = gradients(Elmo(*files, 1, requires_grad=True, dropout=0.0).double(), ids)
    assert len(single) == len(double) == 3 + 1 + 1 + 2 * 3 + 2 * 2 + 2 + 4 * 4
    for name, expected in double.items():
        assert expected.abs().max() > 0, name
        scale = float(expected.abs().max())
        torch.testing.assert_close(single[name].double(), expected, atol=2e-5 * scale, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("_token_embedder._char_embedding_weights", (98, 1)),  # "a"
        ("_token_embedder._char_embedding_weights", (261, 0)),  # padding inside a word
        ("_token_embedder._char_embedding_weights", (258, 2)),  # </S>
        ("_token_embedder.char_conv_1.weight", (0, 2, 1)),
        ("_token_embedder._highways._layers.1.weight", (15, 3)),
        ("_elmo_lstm.forward_layer_0.state_linearity.weight", (11, 2)),
        ("_elmo_lstm.backward_layer_1.state_projection.weight", (4, 7)),
    ],
)
def test_gradients_against_differences(files: tuple[Path, Path], name: str, place: tuple[int, ...]) -> None:
    model = Elmo(*files, 1, requires_grad=True, dropout=0.0, state="zero").double()
    ids = batch_to_ids(LINES)
    value = gradients(model, ids, steps=1)[f"_elmo_lstm.{name}"][place]
    parameter = model.get_parameter(f"_elmo_lstm.{name}")
    sums = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            parameter[place] += step
            mixed = model(ids)["elmo_representations"][0]
            sums.append((mixed * torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed)).sum())
    assert abs(float(value)) > 1e-8
    torch.testing.assert_close(value, (sums[0] - sums[1]) / 2e-5, atol=1e-7, rtol=1e-4)


def test_frozen_language_model(files: tuple[Path, Path]) -> None:
    elmo = Elmo(*files, 2, dropout=0.0)
    trained = {name for name, parameter in elmo.named_parameters() if parameter.requires_grad}
    expected = [f"scalar_parameters.{i}" for i in range(3)] + ["gamma"]
    assert trained == {f"scalar_mix_{k}.{name}" for k in range(2) for name in expected}
    sum(x.sum() for x in elmo(batch_to_ids(LINES))["elmo_representations"]).backward()
    assert all((p.grad is not None) == p.requires_grad for p in elmo.parameters())
