# SPDX-License-Identifier: Apache-2.0
"""Whole models in the benchmark suite: the gate of int8, and peers that come as programs of their own."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import gate, measure, peers
from benchmarks.cases import Case
from benchmarks.measure import Settings
from benchmarks.models import bert
from benchmarks.provider import Provider

INT8 = Case("bert", "tiny", dict(model="minilm", lengths=(16, 5)), "float32+int8", False, "cpu", "small")


def _int8_model(change):
    """ctxfast's MiniLM in int8 after ``change`` of the model or of the call's arguments."""

    def build(case, args):
        model, args = bert._ours(case, args), dict(args)
        with torch.no_grad():
            change(model, args)
        return bert._call(model, args)

    return Provider("int8", build, ours=True)


def _scale_off(model, args):
    """One column's scale is half as large again, in the second product of every feed-forward block."""
    for layer in model.encoder.layer:
        layer.output.dense.weight[7] *= 1.5


def _scale_off_at_the_end(model, args):
    model.encoder.layer[-1].output.dense.weight[7] *= 1.5


def _mask_ignored(model, args):
    inner = model.forward
    model.forward = lambda ids, attention_mask: inner(ids)


def _bias_off(model, args):
    model.encoder.layer[2].attention.self.qkv_bias += 0.5


@pytest.fixture(scope="module")
def int8_gate():
    args = INT8.make()
    judge = gate.Gate(INT8, args)

    def run(provider):
        call = provider.build(INT8, args)
        with torch.no_grad():
            return judge.judge(provider, call.to_case(call.forward()), {})

    return run


def test_int8_models_pass_with_little_room(int8_gate):
    found = int8_gate(_int8_model(lambda model, args: None))
    assert 0.3 * found.bound < found.error < found.bound


@pytest.mark.parametrize("change", [_scale_off, _scale_off_at_the_end, _mask_ignored, _bias_off])
def test_a_wrong_int8_kernel_fails_the_gate(int8_gate, change):
    with pytest.raises(gate.ParityError, match="is off by"):
        int8_gate(_int8_model(change))


# peers

NEW = ("CTranslate2", "Hugging Face, eager, sorted by length")


def _measured(case, names):
    chosen = [provider for provider in peers.providers(case) if provider.name.startswith(names)]
    return {each.provider: each for each in measure.measure(case, chosen, Settings(seconds=0.0))}


@pytest.mark.parametrize("lengths", [(16, 5, 9), (12, 12)])
def test_peers_pass_the_gate_or_say_why_not(lengths):
    pytest.importorskip("ctranslate2", reason="not on this device: CTranslate2 is not installed")
    for dtype in ("float32", "bfloat16", "float32+int8"):
        case = Case("bert", f"tiny {lengths}", dict(model="minilm", lengths=lengths), dtype, False, "cpu", "small")
        found = _measured(case, NEW)
        assert set(NEW) <= set(found) and ("CTranslate2, int8" in found) == (dtype == "float32+int8")
        assert {each.status for each in found.values()} <= {"ok", "cannot run"}, [e.note for e in found.values()]
        by_length = found[NEW[1]]
        if len(set(lengths)) == 1:
            assert by_length.note == "all texts have one length"
        else:
            assert (by_length.status == "ok") == (dtype != "float32+int8")
        if dtype == "bfloat16":  # on some CPUs it has that too
            assert found["CTranslate2"].note in ("", "CTranslate2 has no bfloat16 on this CPU")
        else:
            assert found["CTranslate2"].status == "ok"


def test_a_peer_that_is_not_installed_keeps_its_row(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ctranslate2" else find(name))
    found = _measured(INT8, ("CTranslate2",))
    assert {name: each.note for name, each in found.items()} == dict.fromkeys(
        ("CTranslate2", "CTranslate2, int8"), "not installed (pip install ctranslate2)"
    )
    assert {each.status for each in found.values()} == {"not installed"}


@pytest.mark.slow
def test_a_training_step_passes_its_gate():
    case = Case("bert_mlm", "tiny", dict(model="minilm", lengths=(9, 5)), "float32", False, "cpu", "small")
    found = _measured(case, ("ctxfast", "Hugging Face, eager"))
    assert {each.status for each in found.values()} == {"ok"} and len(found) == 3


def test_peers_of_a_gpu_are_in_the_table():
    """A package that is absent there prints a row; a peer that is not in the table prints none."""
    for op, names in {
        "attention": ("torch varlen_attn", *(f"SDPA padded, {kind}" for kind in ("key mask", "no mask, flash"))),
        "add_layer_norm": ("Liger layer_norm after adds",),
        "linear_cross_entropy": ("Liger fused linear cross entropy",),
        "bert": ("Hugging Face, eager", *(f"Hugging Face, torch.compile {mode}" for mode in MODES)),
        "bert_mlm": ("Hugging Face, eager", *(f"Hugging Face, torch.compile {mode}" for mode in MODES)),
    }.items():
        case = Case(op, "tiny", {}, "bfloat16", False, "cuda", "small")
        assert set(names) <= {provider.name for provider in peers.providers(case, compile=True)}


MODES = ("reduce-overhead", "max-autotune")
