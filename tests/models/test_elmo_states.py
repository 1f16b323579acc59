# SPDX-License-Identifier: Apache-2.0
"""What a text starts from: carried (AllenNLP's rules), steady, zero."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from oracles.elmo_models import fixture_sentences, write_model

import ctxfast
from ctxfast._core import capability
from ctxfast.models.elmo.calibration import SENTENCES
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.modeling import Elmo, ElmoBiLm
from ctxfast.models.elmo.tokenization import batch_to_ids
from ctxfast.models.elmo.weights import random_weights

A, B, C = "the cat sat".split(), ["on"], "another , longer line".split()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_model(tmp_path)


@pytest.fixture
def tiny(shared_data: Path) -> tuple[Path, Path]:
    folder = shared_data / "elmo" / "allennlp_tiny"
    return folder / "options.json", folder / "lm_weights.hdf5"


@torch.no_grad()
def top(model: ElmoBiLm, *sentences: list[str]) -> list[torch.Tensor]:
    """The top layer of each sentence of one batch."""
    layer = model(batch_to_ids(sentences))["activations"][-1]
    return [layer[k, : len(sentence) + 2] for k, sentence in enumerate(sentences)]


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-6, rtol=1e-5)


def test_carried_in_training_and_evaluation_alike(files: tuple[Path, Path]) -> None:
    model, again = ElmoBiLm.from_files(*files), ElmoBiLm.from_files(*files).eval()
    first, second = top(model, A)[0], top(model, A)[0]
    assert not same(first, second)
    assert torch.equal(top(again, A)[0], first) and torch.equal(top(again, A)[0], second)


def test_rows_are_carried_each_for_itself(files: tuple[Path, Path]) -> None:
    model, alone = ElmoBiLm.from_files(*files), [ElmoBiLm.from_files(*files) for _ in range(3)]
    for batch in ([A, B, C], [C, C, B], [B, A, A]):
        for row, (found, sentence) in enumerate(zip(top(model, *batch), batch)):
            assert same(found, top(alone[row], sentence)[0])


def test_larger_and_smaller_batches(files: tuple[Path, Path]) -> None:
    model, first, second = (ElmoBiLm.from_files(*files) for _ in range(3))
    top(model, A)
    grown = top(model, B, C)  # row 1 is new: from zeros
    top(first, A)
    assert same(grown[0], top(first, B)[0]) and same(grown[1], top(second, C)[0])
    assert model._carried.rows == 2
    shrunk = top(model, A)  # row 1 is left as it is
    assert same(shrunk[0], top(first, A)[0]) and model._carried.rows == 2
    back = top(model, B, B)
    assert same(back[0], top(first, B)[0]) and same(back[1], top(second, B)[0])
    assert top(model) == [] and model._carried.rows == 2


def test_reset(files: tuple[Path, Path]) -> None:
    model, fresh = ElmoBiLm.from_files(*files), ElmoBiLm.from_files(*files)
    model.reset_states()
    model.reset_states(torch.zeros(0, dtype=torch.bool))
    start = top(model, A, B, C)
    middle = top(model, A, B, C)
    model.reset_states(torch.tensor([True, False, True]))
    after = top(model, A, B, C)
    assert same(after[0], start[0]) and same(after[2], start[2])
    assert not same(after[1], start[1]) and not same(after[1], middle[1])
    model.reset_states()
    assert all(torch.equal(x, y) for x, y in zip(top(model, A, B, C), top(fresh, A, B, C)))
    with pytest.raises(ValueError) as caught:
        model.reset_states(torch.tensor([True]))
    assert str(caught.value) == (
        "ctxfast.Elmo: mask of reset_states has shape (1,); expected (rows,) = (3,), the rows a state is held for."
    )


def test_carried_state_is_taken_out_and_put_back(files: tuple[Path, Path]) -> None:
    model, other = ElmoBiLm.from_files(*files), ElmoBiLm.from_files(*files)
    assert model.carried_state is None
    top(model, A, B)
    other.carried_state = model.carried_state
    assert all(torch.equal(x, y) for x, y in zip(top(model, C, C), top(other, C, C)))
    other.carried_state = None
    assert torch.equal(top(other, A)[0], top(ElmoBiLm.from_files(*files), A)[0])
    with pytest.raises(ValueError, match=r"carried state c has shape \(2, 2, 3, 9\); expected .* = \(2, 2, 3, 10\)"):
        other.carried_state = torch.zeros(2, 2, 3, 6), torch.zeros(2, 2, 3, 9)


def test_carried_state_follows_the_module_and_no_graph(files: tuple[Path, Path]) -> None:
    elmo = Elmo(*files, 1, requires_grad=True)
    elmo(batch_to_ids([A]))
    carried = elmo._elmo_lstm._carried
    assert not carried.h.requires_grad and not carried.c.requires_grad
    assert tuple(carried.h.shape) == (2, 2, 1, 6) and tuple(carried.c.shape) == (2, 2, 1, 10)
    twin = copy.deepcopy(elmo)
    elmo.double()
    assert carried.h.dtype == torch.float64
    assert elmo(batch_to_ids([B]))["elmo_representations"][0].dtype == torch.float64
    assert twin._elmo_lstm._carried.h.dtype == torch.float32


def test_states_made_under_inference_mode_can_be_trained_from(files: tuple[Path, Path]) -> None:
    for state in ("carry", "steady"):
        elmo = Elmo(*files, 1, requires_grad=True, state=state)
        with torch.inference_mode():
            elmo(batch_to_ids([A]))
        elmo(batch_to_ids([A]))["elmo_representations"][0].sum().backward()
        assert elmo._elmo_lstm._elmo_lstm.forward_layer_0.state_linearity.weight.grad is not None


def test_zero(files: tuple[Path, Path]) -> None:
    model, carrying = ElmoBiLm.from_files(*files, state="zero"), ElmoBiLm.from_files(*files)
    first = top(model, A)[0]
    assert torch.equal(first, top(model, A)[0])
    assert same(first, top(carrying, A)[0])


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "state"), [("tiny", "steady"), ("tiny", "zero"), ("small", "steady"), ("original", "zero")]
)
def test_a_sentence_does_not_depend_on_its_batch(tiny: tuple[Path, Path], state: str, size: str) -> None:
    """Bit for bit, in every layer: alone, in order, in another order, among longer and more sentences."""
    if capability.extension() is None:
        pytest.skip("needs the compiled CPU kernels: the reference's matrix products round by batch size")
    sentences = [text for lane in fixture_sentences(tiny[0].parent) for text in lane[2:4]] + [A, B, [], C, ["a"]]
    model = ElmoBiLm.from_files(*tiny, state=state)
    if size != "tiny":  # as wide as a public model, with fewer cells
        config = dataclasses.replace(ElmoConfig.preset(size), cell_size=64)
        model = ElmoBiLm.from_weights(config, random_weights(config), state=state)
        model.calibrate([A, B])
        sentences = sentences[-6:]

    def every_layer(batch: list[list[str]]) -> list[torch.Tensor]:
        layers = torch.stack(model(batch_to_ids(batch))["activations"])
        return [layers[:, k, : len(sentence) + 2] for k, sentence in enumerate(batch)]

    with ctxfast.use_impl(lstm="cpu"):
        alone = [every_layer([sentence])[0] for sentence in sentences]
        order = torch.randperm(len(sentences)).tolist()
        for found, expected in zip(every_layer(sentences), alone):
            assert torch.equal(found, expected)
        for found, k in zip(every_layer([sentences[k] for k in order]), order):
            assert torch.equal(found, alone[k])
        for found, k in zip(every_layer([sentences[k] for k in order[:3]]), order):
            assert torch.equal(found, alone[k])


@torch.no_grad()
def test_steady_is_close_to_carried(tiny: tuple[Path, Path]) -> None:
    lanes = fixture_sentences(tiny[0].parent)

    def outputs(state: str) -> torch.Tensor:
        model, found = ElmoBiLm.from_files(*tiny, state=state), []
        for step in range(10):
            batch = [lane[step] for lane in lanes]
            layers = torch.stack(model(batch_to_ids(batch))["activations"][1:])
            if step:  # the first step of "carry" is "zero"
                found += [layers[:, k, 1 : len(text) + 1].flatten() for k, text in enumerate(batch)]
        return torch.cat(found)

    carried = outputs("carry")
    zero, steady = (float((outputs(state) - carried).pow(2).mean().sqrt()) for state in ("zero", "steady"))
    assert zero > 0.1  # the fixture does show it
    assert steady < 0.05 and 3 * steady < zero


def test_steady_state_is_calibrated_saved_and_loaded(files: tuple[Path, Path], tmp_path: Path) -> None:
    model = ElmoBiLm.from_files(*files, state="steady")
    assert model.steady_state is None
    with pytest.raises(RuntimeError, match=r"there is no steady state yet. Call calibrate\(\) first"):
        model.save_steady_state(tmp_path / "s")
    by_default = top(model, A)[0]
    h, c = model.steady_state
    assert tuple(h.shape) == (2, 2, 6) and tuple(c.shape) == (2, 2, 10)
    other = ElmoBiLm.from_files(*files, state="steady")
    other.calibrate(SENTENCES)
    assert torch.equal(other.steady_state[0], h) and torch.equal(top(other, A)[0], by_default)
    other.calibrate([C, A, B, C, A])
    changed = top(other, A)[0]
    assert not same(changed, by_default)
    other.save_steady_state(tmp_path / "state.safetensors")
    model.load_steady_state(tmp_path / "state.safetensors")
    assert torch.equal(top(model, A)[0], changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["options.json", "state.safetensors", "weights.hdf5"]
    model.load_state_dict(model.state_dict())
    assert model.steady_state is None  # it belonged to the weights before


def test_steady_state_is_the_mean_of_final_states(files: tuple[Path, Path]) -> None:
    model, carrying = ElmoBiLm.from_files(*files), ElmoBiLm.from_files(*files)
    model.calibrate([A, B, C], lanes=1)
    h, c = [], []
    for step, sentence in enumerate([A, B, C]):
        top(carrying, sentence)
        if step:
            h.append(carrying._carried.h[:, :, 0])
            c.append(carrying._carried.c[:, :, 0])
    torch.testing.assert_close(model.steady_state, (torch.stack(h).mean(0), torch.stack(c).mean(0)))
    assert model._carried.rows == 0
    model.calibrate([A])  # nothing but a first sentence
    assert model.steady_state[0].abs().sum() > 0


def test_steady_state_ignores_recurrent_dropout(files: tuple[Path, Path]) -> None:
    plain, dropping = ElmoBiLm.from_files(*files), ElmoBiLm.from_files(*files)
    dropping._elmo_lstm.recurrent_dropout_probability = 0.5
    torch.testing.assert_close(dropping.calibrate(), plain.calibrate())
    assert dropping._elmo_lstm.training


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda model, folder: model.calibrate([]),
            ValueError,
            "ctxfast.Elmo: sentences to calibrate on is empty; expected tokenised sentences of running text.",
        ),
        (
            lambda model, folder: model.load_steady_state(folder / "none"),
            FileNotFoundError,
            "ctxfast.Elmo: there is no steady state file {}/none.",
        ),
        (
            lambda model, folder: model._steady.set((torch.zeros(2, 2, 6), torch.zeros(2, 2, 9)), torch.zeros(1)),
            ValueError,
            "ctxfast.Elmo: steady state c has shape (2, 2, 9); expected (layers, 2, size) = (2, 2, 10). It belongs to "
            "another model.",
        ),
    ],
)
def test_errors(files: tuple[Path, Path], tmp_path: Path, call, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call(ElmoBiLm.from_files(*files), tmp_path)
    assert str(caught.value) == message.format(tmp_path)


def test_a_file_that_holds_no_steady_state(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="options.json is damaged, cut short or no steady state"):
        ElmoBiLm.from_files(*files).load_steady_state(files[0])
