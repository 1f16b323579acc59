# SPDX-License-Identifier: Apache-2.0
"""What is peculiar to ``char_cnn`` on the CPU: words that do not feel each other, packed weights never stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import emulated

import ctxfast
from ctxfast._core import capability
from ctxfast.ops.char_cnn import cases, cpu

CASES = {case.id: case for case in cases.CASES}


def _padded(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return CASES["padded"].make("cpu", dtype, 5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_words_bits_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    kwargs = _padded(dtype)
    ids, before = kwargs["char_ids"], torch.get_num_threads()
    whole = ctxfast.char_cnn(**kwargs, impl="cpu")
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for first in range(len(ids)):
                for last in (first + 1, len(ids)):
                    part = ctxfast.char_cnn(**{**kwargs, "char_ids": ids[first:last]}, impl="cpu")
                    assert torch.equal(part, whole[first:last]), (threads, first, last)
    finally:
        torch.set_num_threads(before)


def test_training_gives_the_same_bits() -> None:
    kwargs = _padded()
    plain = ctxfast.char_cnn(**kwargs, impl="cpu")
    kwargs["char_embeddings"].requires_grad_()
    assert torch.equal(ctxfast.char_cnn(**kwargs, impl="cpu").detach(), plain)


@torch.no_grad()
def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adds up in the same order; those that round a product and its sum at once agree to the last bit."""
    extension, kwargs = capability.extension(), _padded()
    if extension is None:
        pytest.skip(capability.why_no_extension())
    expected, seen = ctxfast.char_cnn(**kwargs, impl="cpu"), []

    class Chosen:
        def __init__(self, isa: str) -> None:
            self.isa = isa

        def char_cnn_forward(self, *args: Any) -> None:
            seen.append(self.isa)
            extension.char_cnn_forward(*args, isa=self.isa)

    chosen = [emulated.Instead(Chosen(isa)) for isa in extension.cpu_isas()]
    for isa, both in zip(extension.cpu_isas(), chosen):
        monkeypatch.setattr(capability, "extension", lambda both=both: both)
        found = ctxfast.char_cnn(**kwargs, impl="cpu")
        torch.testing.assert_close(found, expected, rtol=0 if "avx" in isa else 1e-5, atol=0 if "avx" in isa else 1e-5)
    assert seen == extension.cpu_isas()


@torch.no_grad()
def test_changed_weights_are_packed_anew() -> None:
    kwargs = _padded()
    before = ctxfast.char_cnn(**kwargs, impl="cpu")
    kwargs["conv_weights"][2].data.mul_(-1)  # leaves the version counter alone
    kwargs["conv_biases"][0].data.add_(1)
    after = ctxfast.char_cnn(**kwargs, impl="cpu")
    fresh = {name: [t.clone() for t in value] if isinstance(value, list) else value for name, value in kwargs.items()}
    assert not torch.equal(before, after) and torch.equal(after, ctxfast.char_cnn(**fresh, impl="cpu"))


def test_passing_weights_are_not_kept() -> None:
    kwargs, held = _padded(), len(cpu._packed)
    kwargs["conv_weights"][0].requires_grad_()
    ctxfast.char_cnn(**kwargs, impl="cpu").sum().backward()  # in training: other weights at every step
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # new rounded copies at every call
        assert ctxfast.char_cnn(**kwargs, impl="cpu").dtype == torch.bfloat16
    assert len(cpu._packed) == held
    with torch.no_grad():
        ctxfast.char_cnn(**kwargs, impl="cpu")
    assert len(cpu._packed) == held + 1
    del kwargs
    assert len(cpu._packed) == held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.half(), "it takes float32 and bfloat16 and char_embeddings is torch.float16."),
        (
            lambda x: torch.cat([x] * 40, 1),
            "it takes words of 1 to 16384 numbers, characters times embedding size, and these have 32000.",
        ),
    ],
)
def test_refusals(change: Any, message: str) -> None:
    kwargs = _padded()
    kwargs["char_embeddings"] = change(kwargs["char_embeddings"])
    size, dtype = kwargs["char_embeddings"].shape[1], kwargs["char_embeddings"].dtype
    kwargs["conv_weights"] = [torch.ones(3, size, 2, dtype=dtype)]
    kwargs["conv_biases"] = [torch.ones(3, dtype=dtype)]
    with pytest.raises(RuntimeError, match=message):
        ctxfast.char_cnn(**kwargs, impl="cpu")
    assert ctxfast.explain("char_cnn", **kwargs).used == "reference"
