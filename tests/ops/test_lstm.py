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
from ctxfast.ops.shared.definitions import rounded_rows

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


ROUNDED = [torch.bfloat16, torch.int8]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_one_step_is_the_product_of_rounded_factors(impl, dtype) -> None:
    """Nothing computed is rounded before the only product of h, so the definition holds to float32's last digits."""
    x, args = _weights()
    x, h_0, c_0 = x[:, :1], torch.randn(1, 2, 4), torch.randn(1, 2, 12)
    factors = {name: [rounded_rows(w, dtype) for w in args[name]] for name in ("weight_ih", "weight_hh")}
    exact = {**args, **factors, "weight_proj": None, "bias": None}
    z = x[:, 0].double()
    z = rounded_rows(x, dtype)[:, 0].double() @ exact["weight_ih"][0].double().t()
    z = z + rounded_rows(h_0[0], dtype).double() @ exact["weight_hh"][0].double().t() + args["bias"][0].double()
    i, f, g, o = z.chunk(4, dim=1)
    expected = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * c_0[0]
    _, (_, c_n) = ctxfast.lstm(x, **args, initial_state=(h_0, c_0), weight_dtype=dtype, impl=impl)
    torch.testing.assert_close(c_n[0].double(), expected, rtol=1e-6, atol=1e-6)
    m = torch.sigmoid(o) * torch.tanh(expected)
    proj = rounded_rows(args["weight_proj"][0], dtype).double()
    h = rounded_rows(m.float(), dtype).double() @ proj.t()
    output, _ = ctxfast.lstm(x, **args, initial_state=(h_0, c_0), weight_dtype=dtype, impl=impl)
    torch.testing.assert_close(output[:, 0].double(), h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_narrow_products_stay_near_wide_ones(dtype) -> None:
    x, args = _weights()
    wide, _ = ctxfast.lstm(x, **args, impl="cpu")
    narrow, _ = ctxfast.lstm(x, **args, weight_dtype=dtype, impl="cpu")
    assert not torch.equal(wide, narrow)
    assert (wide - narrow).abs().max() < (0.004 if dtype is torch.bfloat16 else 0.02) * wide.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_run_wide_inside(dtype) -> None:
    """Nearer to float64 than plain PyTorch in the same dtype, and gradients come in that dtype."""
    x, args = _weights()
    args = {name: [w.to(dtype).requires_grad_() for w in args[name]] for name in args}
    x = x.to(dtype)
    wide = {name: [w.detach().double() for w in args[name]] for name in args}
    exact = ctxfast.lstm(x.double(), **wide, impl="reference")[0]
    errors = {}
    for impl in IMPLS:
        output, (h_n, c_n) = ctxfast.lstm(x, **args, impl=impl)
        assert output.dtype == h_n.dtype == c_n.dtype == dtype
        errors[impl] = (output.double() - exact).square().mean()
    assert errors["cpu"] <= errors["reference"]
    for grad in torch.autograd.grad(output.sum(), [w for ws in args.values() for w in ws]):
        assert grad.dtype == dtype


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
    first = cpu._pack(args["weight_hh"][0], args["weight_proj"][0], "float32")
    assert cpu._pack(args["weight_hh"][0], args["weight_proj"][0], "float32") is first
    ctxfast.lstm(x, **args, weight_dtype=torch.bfloat16, impl="cpu")
    assert len(cpu._packed) == before + 3  # recurrent weights in float32 and bfloat16, input weights in bfloat16
    del args
    gc.collect()
    assert len(cpu._packed) == before


def test_inference_mode_and_its_tensors() -> None:
    with torch.inference_mode():
        x, args = _weights()
        got, _ = ctxfast.lstm(x, **args, impl="cpu")
        expected, _ = ctxfast.lstm(x, **args, impl="reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_does_not_depend_on_its_batch(kind) -> None:
    """A row has the same bits alone and in company, at any thread count: input product and recurrence."""
    x, ih, bias = torch.randn(19, 5, 70), torch.randn(4 * 33, 70), torch.randn(4 * 33)
    hh, proj = torch.randn(4 * 33, 17), torch.randn(17, 33)
    lengths = torch.tensor([5, 1, 4, 0, 5, 2, 3, 5, 1, 5, 5, 4, 3, 2, 2, 5, 1, 5, 3])
    fwd = torch.ops.ctxfast.lstm_cpu_fwd.default

    def run(x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = ([w, w] for w in (x, ih, bias, hh, proj))
        return fwd(*both, lengths, None, None, 0.0, 0.0, kind, True, kind == "bfloat16")

    whole = run(x, lengths)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for row in (0, 1, 3, 6, 11, 18):
                alone = run(x[row : row + 1], lengths[row : row + 1])
                assert torch.equal(alone[0], whole[0][row : row + 1])
                for i in (1, 2, 3, 4):
                    assert torch.equal(alone[i], whole[i][:, row : row + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("batch", "size"), [(1, 33), (5, 130), (35, 70)])
def test_every_instruction_set_of_this_machine(kind, batch, size) -> None:
    """int8: the same bits everywhere. bfloat16: the same but for AMX. float32: the same but for the last digits."""
    c, hidden = capability.extension(), 40
    x, ih, bias = torch.randn(batch, 2, size), torch.randn(4 * hidden, size) / size**0.5, torch.randn(4 * hidden)
    hh, proj = torch.randn(4 * hidden, 20) / 4, torch.randn(20, hidden) / 6
    packed, packed_ih = cpu._pack(hh, proj, kind), cpu._pack_input(ih, kind)
    found = {}
    for isa in c.cpu_isas():
        z = torch.full((batch, 2, 4 * hidden), torch.nan)
        output, h_n, c_n = torch.empty(batch, 2, 20), torch.empty(1, batch, 20), torch.empty(1, batch, hidden)
        c.lstm_forward(
            batch, 2, 1, hidden, 20, True, kind, size, [x.data_ptr()], [x.stride()[:2]], [packed_ih.data_ptr()],
            [bias.data_ptr()], [packed.data_ptr()], 0, 0, 0, output.data_ptr(), output.stride()[:2], h_n.data_ptr(),
            c_n.data_ptr(), z=z.data_ptr(), isa=isa,
        )  # fmt: skip
        found[isa] = (z, output, c_n)
    exact = {"float32": (), "bfloat16": set(found) - {"amx"}, "int8": set(found)}[kind]
    for isa, tensors in found.items():
        for one, two in zip(tensors, found["generic"]):
            assert torch.equal(one, two) or isa not in exact
            torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-3 if kind == "bfloat16" else 3e-6)


def test_int8_sums_have_a_longest() -> None:
    x, wide = torch.zeros(1, 1, 65537), torch.zeros(4, 65537)
    with pytest.raises(
        RuntimeError, match="its int8 sums take at most 65536 terms, and a weight matrix has more columns"
    ):
        ctxfast.lstm(x, wide, torch.zeros(4, 1), weight_dtype=torch.int8, impl="cpu")
    ctxfast.lstm(x, wide, torch.zeros(4, 1), weight_dtype=torch.bfloat16, impl="cpu")
