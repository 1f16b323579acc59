# SPDX-License-Identifier: Apache-2.0
"""``ctxfast.nn.LSTM`` beside ``torch.nn.LSTM``: same draws, names, forms of input, results and gradients."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import ctxfast
from ctxfast.nn import LSTM

SIZES = (5, 8)
LENGTHS = (4, 7, 1)

OPTIONS = [
    dict(),
    dict(bias=False),
    dict(batch_first=True),
    dict(bidirectional=True),
    dict(proj_size=3),
    dict(num_layers=3),
    dict(num_layers=2, bidirectional=True, proj_size=3, batch_first=True),
    dict(num_layers=2, bidirectional=True, bias=False),
    dict(num_layers=3, bidirectional=True, proj_size=3, bias=False),
    dict(num_layers=3, dropout=0.4, bidirectional=True),
    dict(num_layers=2, dropout=0.4, batch_first=True),
]
FORMS = ["batched", "unbatched", "packed", "packed-unsorted", "packed-list"]


def _name(options: dict) -> str:
    return "-".join(f"{name}{value}" for name, value in options.items()) or "plain"


def _pair(**options) -> tuple[nn.LSTM, LSTM]:
    """Torch's module and ours, drawn from one seed."""
    modules = []
    for kind in (nn.LSTM, LSTM):
        torch.manual_seed(11)
        modules.append(kind(*SIZES, **options))
    return tuple(modules)


def _packs_projection() -> bool:
    """Older versions of torch run no packed projected LSTM on a CPU."""
    packed = pack_padded_sequence(torch.zeros(2, 2, 2), torch.tensor([2, 1]))
    try:
        nn.LSTM(2, 4, proj_size=2)(packed)
    except RuntimeError:
        return False
    return True


def _input(form: str, module: nn.LSTM, x: Tensor) -> Tensor | PackedSequence:
    """``x`` (B, T, I) in one of the forms that torch takes."""
    if form == "batched":
        return x if module.batch_first else x.transpose(0, 1)
    if form == "unbatched":
        return x[0]
    if form == "packed-list":
        return pack_sequence([row[:length] for row, length in zip(x, LENGTHS)], enforce_sorted=False)
    rows = x if form == "packed-unsorted" else x[[1, 0, 2]]
    lengths = torch.tensor(LENGTHS if form == "packed-unsorted" else sorted(LENGTHS, reverse=True))
    rows = rows if module.batch_first else rows.transpose(0, 1)
    return pack_padded_sequence(rows, lengths, module.batch_first, enforce_sorted=form == "packed")


def _state(form: str, module: nn.LSTM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if form == "unbatched" else (3,)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    return tuple(torch.randn(layers, *batch, size, generator=generator) for size in sizes)


def _run(module: nn.Module, form: str, with_state: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of everything, by name."""
    torch.manual_seed(5)
    x = torch.randn(3, 7, SIZES[0], requires_grad=True)
    state = tuple(s.requires_grad_() for s in _state(form, module)) if with_state else None
    torch.manual_seed(6)  # for the dropout
    output, (h_n, c_n) = module(_input(form, module, x), state)
    outputs = [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]
    generator = torch.Generator().manual_seed(7)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    leaves = {"x": x, **dict(module.named_parameters())}
    if state is not None:
        leaves |= {"h_0": state[0], "c_0": state[1]}
    return outputs, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def _equal(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype, what
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS, ids=_name)
def test_equals_torch(options, form) -> None:
    """Outputs, states and gradients, with and without an initial state, in training (dropout) and without."""
    theirs, ours = _pair(**options)
    if options.get("proj_size") and form.startswith("packed") and not _packs_projection():
        pytest.skip("not on this device: torch's own module refuses")
    for with_state, training in itertools.product((False, True), (True, False)):
        expected, expected_grads = _run(theirs.train(training), form, with_state)
        found, grads = _run(ours.train(training), form, with_state)
        for name, one, two in zip(("output", "h_n", "c_n"), found, expected):
            _equal(one, two, name)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            _equal(grad, expected_grads[name], f"gradient of {name}")


@pytest.mark.parametrize("form", ["packed", "packed-unsorted", "packed-list"])
def test_packed_output_keeps_its_order(form) -> None:
    theirs, ours = _pair(bidirectional=True)
    x = torch.randn(3, 7, SIZES[0])
    expected, _ = theirs(_input(form, theirs, x))
    found, _ = ours(_input(form, ours, x))
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        one, two = getattr(found, name), getattr(expected, name)
        assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize("options", OPTIONS, ids=_name)
def test_names_first_values_and_state_dict(options) -> None:
    theirs, ours = _pair(**options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for (name, one), (_, two) in zip(theirs.named_parameters(), ours.named_parameters()):
        assert torch.equal(one, two), name
    assert [[w.shape for w in ws] for ws in theirs.all_weights] == [[w.shape for w in ws] for ws in ours.all_weights]
    x = torch.randn(4, 2, SIZES[0])
    for kind, source in ((LSTM, theirs), (nn.LSTM, ours)):
        target = kind(*SIZES, **options).eval()
        target.load_state_dict(source.state_dict())
        _equal(target(x)[0], source.eval()(x)[0], "output after load_state_dict")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_clips_projection_and_impl(impl) -> None:
    module = LSTM(*SIZES, bidirectional=True, batch_first=True, proj_size=3, cell_clip=0.1, proj_clip=0.05, impl=impl)
    weights = module.state_dict()
    sides = ("", "_reverse")
    x = torch.randn(2, 6, SIZES[0])
    expected, (h_n, c_n) = ctxfast.lstm(
        x,
        *([weights[f"weight_{kind}_l0{side}"] for side in sides] for kind in ("ih", "hh")),
        [weights[f"bias_ih_l0{side}"] + weights[f"bias_hh_l0{side}"] for side in sides],
        [weights[f"weight_hr_l0{side}"] for side in sides],
        cell_clip=0.1,
        proj_clip=0.05,
        impl="reference",
    )
    output, state = module(x)
    for one, two in ((output, expected), (state[0], h_n), (state[1], c_n)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert state[1].abs().max().item() == pytest.approx(0.1) and output.abs().max() <= 0.05
    text = repr(module)
    assert "cell_clip=0.1" in text and "proj_clip=0.05" in text and f"impl={impl}" in text


def test_weight_dtype_reaches_the_op() -> None:
    torch.manual_seed(11)
    exact, rounded = _pair()[1], LSTM(*SIZES, weight_dtype=torch.int8)
    rounded.load_state_dict(exact.state_dict())
    x = torch.randn(4, 2, SIZES[0])
    difference = (exact(x)[0] - rounded(x)[0]).abs().max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype) -> None:
    theirs, ours = _pair(num_layers=2, bidirectional=True)
    x = torch.randn(6, 3, SIZES[0])
    exact = theirs.double()(x.double())[0]
    output, (h_n, c_n) = ours.to(dtype)(x.to(dtype))
    assert output.dtype == h_n.dtype == c_n.dtype == dtype
    assert (output.double() - exact).abs().max() < {torch.float64: 1e-12}.get(dtype, 1e-2)


def test_autocast_gives_torch_dtypes() -> None:
    theirs, ours = _pair()
    x = torch.randn(6, 3, SIZES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (expected, expected_state), (found, state) = theirs(x), ours(x)
    assert [found.dtype, *(s.dtype for s in state)] == [expected.dtype, *(s.dtype for s in expected_state)]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True, proj_size=3)], ids=_name)
def test_compiles_whole(options) -> None:
    ours = _pair(**options)[1]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, state = torch.randn(7, 3, SIZES[0]), _state("batched", ours)
    found = []
    for module in (compiled, ours):
        output, (h_n, c_n) = module(x, state)
        grads = torch.autograd.grad(output.sum() + c_n.square().sum(), list(ours.parameters()))
        found.append([output, h_n, c_n, *grads])
    for one, two in zip(*found):
        _equal(one, two, "compiled")


def test_copies_pickles_and_moves() -> None:
    ours = LSTM(*SIZES, num_layers=2, cell_clip=1.0, impl="cpu").eval()
    x = torch.randn(4, 2, SIZES[0])
    expected = ours(x)[0]
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded, ours.double().float(), ours.to("cpu")):
        assert torch.equal(other(x)[0], expected)
        assert (other.cell_clip, other.impl, other.training) == (1.0, "cpu", False)
    ours.flatten_parameters()
    meta = LSTM(*SIZES, device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    meta.to_empty(device="cpu").load_state_dict(LSTM(*SIZES).state_dict())
    assert meta(x)[0].shape == (4, 2, 8)


def test_weights_of_functional_call_and_parametrization_are_used() -> None:
    theirs, ours = _pair()
    x = torch.randn(4, 2, SIZES[0])
    doubled = {name: 2 * value.detach() for name, value in ours.named_parameters()}
    expected = nn.LSTM(*SIZES)
    expected.load_state_dict(doubled)
    _equal(torch.func.functional_call(ours, doubled, (x,))[0], expected(x)[0], "functional_call")
    torch.nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    _equal(ours(x)[0], theirs(x)[0], "weight_norm")


BAD_CALLS = {
    "dimensions": lambda m: m(torch.zeros(2, 2, 2, 5)),
    "input size": lambda m: m(torch.zeros(4, 2, 6)),
    "dtype": lambda m: m(torch.zeros(4, 2, 5, dtype=torch.float64)),
    "no steps": lambda m: m(torch.zeros(0, 2, 5)),
    "h of another batch": lambda m: m(torch.zeros(4, 2, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))),
    "c of another size": lambda m: m(torch.zeros(4, 2, 5), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 9))),
    "unbatched state": lambda m: m(torch.zeros(4, 2, 5), (torch.zeros(1, 8), torch.zeros(1, 8))),
    "batched state": lambda m: m(torch.zeros(4, 5), (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refuses_what_torch_refuses_in_its_words(name) -> None:
    theirs, ours = _pair()
    with pytest.raises((RuntimeError, ValueError)) as expected:
        BAD_CALLS[name](theirs)
    with pytest.raises(expected.type) as found:
        BAD_CALLS[name](ours)
    assert str(found.value) == str(expected.value)


def test_packed_state_of_another_batch() -> None:
    packed = pack_sequence([torch.zeros(3, 5), torch.zeros(1, 5)])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 8\), got \[1, 3, 8\]"):
        LSTM(*SIZES)(packed, (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)))


@pytest.mark.parametrize(
    "options",
    [dict(proj_size=8), dict(proj_size=-1), dict(dropout=1.5, num_layers=2), dict(num_layers=0), dict(bias=1)],
    ids=_name,
)
def test_constructor_refuses_what_torch_refuses(options) -> None:
    with pytest.raises((TypeError, ValueError)) as expected:
        nn.LSTM(*SIZES, **options)
    with pytest.raises(expected.type) as found:
        LSTM(*SIZES, **options)
    assert str(found.value) == str(expected.value)


def test_dropout_of_one_layer_warns_as_torch() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        LSTM(*SIZES, dropout=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cell_clip=0.0), "ctxfast.nn.LSTM: cell_clip is 0.0; expected a number above 0, or None for no clipping."),
        (dict(proj_clip=-1), "ctxfast.nn.LSTM: proj_clip is -1; expected a number above 0"),
        (dict(weight_dtype=torch.float16), "ctxfast.nn.LSTM: weight_dtype is torch.float16; expected None"),
    ],
)
def test_own_options_are_checked(options, message) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        LSTM(*SIZES, **options)


def test_empty_batch() -> None:
    theirs, ours = _pair(bidirectional=True)
    for one, two in zip(ours(torch.zeros(4, 0, 5))[1], theirs(torch.zeros(4, 0, 5))[1]):
        assert one.shape == two.shape
