# SPDX-License-Identifier: Apache-2.0
"""What is peculiar to ``lstm``: torch's own module as a second oracle, packed weights that never go stale."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ctxfast
from ctxfast._core import capability
from ctxfast.ops.lstm import cpu

IMPLS = ["reference", "cpu"]


def _arguments(module: torch.nn.LSTM) -> dict:
    names = [""] + ["_reverse"] * module.bidirectional
    return dict(
        weight_ih=[getattr(module, f"weight_ih_l0{name}") for name in names],
        weight_hh=[getattr(module, f"weight_hh_l0{name}") for name in names],
        bias=[getattr(module, f"bias_ih_l0{name}") + getattr(module, f"bias_hh_l0{name}") for name in names],
        weight_proj=[getattr(module, f"weight_hr_l0{name}") for name in names] if module.proj_size else None,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, 7])
def test_equals_torch_lstm(impl, bidirectional, proj_size) -> None:
    module = torch.nn.LSTM(5, 12, proj_size=proj_size, bidirectional=bidirectional, batch_first=True)
    x, lengths = torch.randn(4, 6, 5), torch.tensor([6, 4, 2, 1])
    directions, size = 1 + bidirectional, proj_size or 12
    state = (torch.randn(directions, 4, size), torch.randn(directions, 4, 12))
    packed, (h_n, c_n) = module(pack_padded_sequence(x, lengths, batch_first=True), state)
    expected, _ = pad_packed_sequence(packed, batch_first=True, total_length=6)
    output, (h, c) = ctxfast.lstm(x, **_arguments(module), lengths=lengths, initial_state=state, impl=impl)
    for one, two in ((output, expected), (h, h_n), (c, c_n)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def _weights() -> tuple[torch.Tensor, dict]:
    module = torch.nn.LSTM(5, 12, proj_size=4, batch_first=True)
    return torch.randn(2, 3, 5), {k: [t.detach() for t in v] for k, v in _arguments(module).items()}


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_weights_are_rounded_weights(impl) -> None:
    x, args = _weights()
    rounded = {
        **args,
        **{name: [w.bfloat16().float() for w in args[name]] for name in ("weight_hh", "weight_proj")},
    }
    got, _ = ctxfast.lstm(x, **args, weight_dtype=torch.bfloat16, impl=impl)
    expected, _ = ctxfast.lstm(x, **rounded, impl=impl)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got, ctxfast.lstm(x, **args, impl=impl)[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),  # in place: the version counter moves
        lambda w: w.data.mul_(2),  # past the version counter
        lambda w: setattr(w, "data", w.data * 2),  # another address
    ],
    ids=["in-place", "through-data", "replaced"],
)
def test_packed_weights_follow_their_source(change) -> None:
    x, args = _weights()
    ctxfast.lstm(x, **args, impl="cpu")
    for name in ("weight_hh", "weight_proj"):
        change(args[name][0])
    torch.testing.assert_close(
        ctxfast.lstm(x, **args, impl="cpu")[0], ctxfast.lstm(x, **args, impl="reference")[0], rtol=1e-5, atol=1e-6
    )


def test_packed_weights_are_kept_and_let_go() -> None:
    x, args = _weights()
    gc.collect()
    before = len(cpu._packed)
    first = cpu._pack(args["weight_hh"][0], args["weight_proj"][0], False)
    assert cpu._pack(args["weight_hh"][0], args["weight_proj"][0], False) is first
    ctxfast.lstm(x, **args, weight_dtype=torch.bfloat16, impl="cpu")
    assert len(cpu._packed) == before + 2  # float32 and bfloat16
    del args
    gc.collect()
    assert len(cpu._packed) == before


def test_inference_mode_and_its_tensors() -> None:
    with torch.inference_mode():
        x, args = _weights()
        got, _ = ctxfast.lstm(x, **args, impl="cpu")
        expected, _ = ctxfast.lstm(x, **args, impl="reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The recurrence gives a row the same bits alone and in company, at any thread count."""
    gates = torch.randn(9, 5, 4 * 33)
    hh, proj = torch.randn(4 * 33, 17), torch.randn(17, 33)
    lengths = torch.tensor([5, 1, 4, 0, 5, 2, 3, 5, 1])
    fwd = torch.ops.ctxfast.lstm_cpu_fwd.default
    whole = fwd([gates, gates], [hh, hh], [proj, proj], lengths, None, None, 0.0, 0.0, False, True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for row in range(9):
                g, n = gates[row : row + 1], lengths[row : row + 1]
                alone = fwd([g, g], [hh, hh], [proj, proj], n, None, None, 0.0, 0.0, False, True)
                assert torch.equal(alone[0], whole[0][row : row + 1])
                for i in (1, 2, 3):
                    assert torch.equal(alone[i], whole[i][:, row : row + 1])
    finally:
        torch.set_num_threads(before)


def test_every_instruction_set_of_this_machine() -> None:
    """Each compiled variant the processor can run agrees with the reference."""
    c = capability.extension()
    order = ("generic", "avx2", "avx512")
    x, args = _weights()
    expected, _ = ctxfast.lstm(x, **args, impl="reference")
    gates = torch.nn.functional.linear(x, args["weight_ih"][0], args["bias"][0])
    packed = cpu._pack(args["weight_hh"][0], args["weight_proj"][0], False)
    for isa in order[: order.index(c.cpu_isa()) + 1]:
        output, h_n, c_n = torch.empty(2, 3, 4), torch.empty(1, 2, 4), torch.empty(1, 2, 12)
        c.lstm_forward(
            2, 3, 12, 4, True, [gates.data_ptr()], [gates.stride()[:2]], [packed.data_ptr()], "float32", 0, 0, 0,
            output.data_ptr(), output.stride()[:2], h_n.data_ptr(), c_n.data_ptr(), isa=isa,
        )  # fmt: skip
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_double_backward_is_refused() -> None:
    x, args = _weights()
    x.requires_grad_()
    output, _ = ctxfast.lstm(x, **args, impl="cpu")
    with pytest.raises(RuntimeError, match="lstm_cpu_bwd is the raw kernel and has no gradient of its own"):
        torch.autograd.grad(output.sum(), x, create_graph=True)
