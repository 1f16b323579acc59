# SPDX-License-Identifier: Apache-2.0
"""Packing on tiny literal tensors: where tokens go, what comes back, what is refused."""

from __future__ import annotations

import pytest
import torch

from ctxfast.packing import Packing

HOLES = [[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]


def _facts(packing: Packing) -> dict:
    return dict(
        indices=packing.indices.tolist(),
        cu_seqlens=packing.cu_seqlens.tolist(),
        max_seqlen=packing.max_seqlen,
        size=(packing.batch_size, packing.seqlen),
        lengths=packing.lengths,
        columns=packing.columns.tolist(),
        rows=packing.rows.tolist(),
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32])
def test_mask_with_holes_and_an_empty_row(dtype: torch.dtype) -> None:
    packing = Packing.from_mask(torch.tensor(HOLES).to(dtype))
    assert _facts(packing) == dict(
        indices=[0, 2, 3, 9],
        cu_seqlens=[0, 3, 3, 4],
        max_seqlen=3,
        size=(3, 4),
        lengths=(3, 0, 1),
        columns=[0, 2, 3, 1],
        rows=[0, 0, 0, 2],
    )
    assert packing.indices.dtype == torch.int64
    assert packing.cu_seqlens.dtype == torch.int32
    assert not packing.is_full


def test_right_padding_by_mask_and_by_lengths_agree() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    expected = dict(
        indices=[0, 1, 3, 6, 7, 8],
        cu_seqlens=[0, 2, 3, 6],
        max_seqlen=3,
        size=(3, 3),
        lengths=(2, 1, 3),
        columns=[0, 1, 0, 0, 1, 2],
        rows=[0, 0, 1, 2, 2, 2],
    )
    assert _facts(Packing.from_mask(mask)) == expected
    assert _facts(Packing.from_lengths([2, 1, 3])) == expected
    assert _facts(Packing.from_lengths(torch.tensor([2, 1, 3]), seqlen=3)) == expected


@pytest.mark.parametrize(
    "packing",
    [Packing.full(2, 2), Packing.from_mask(torch.ones(2, 2)), Packing.from_lengths((2, 2))],
    ids=["full", "mask", "lengths"],
)
def test_without_padding_packing_is_a_view(packing: Packing) -> None:
    assert packing.is_full
    assert _facts(packing) == dict(
        indices=[0, 1, 2, 3], cu_seqlens=[0, 2, 4], max_seqlen=2, size=(2, 2), lengths=(2, 2),
        columns=[0, 1, 0, 1], rows=[0, 0, 1, 1],
    )  # fmt: skip
    x = torch.arange(4.0).reshape(2, 2)
    assert packing.pack(x).data_ptr() == x.data_ptr()
    assert packing.unpack(packing.pack(x)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(0, 4), torch.zeros(2, 0), torch.zeros(2, 3)],
    ids=["no-texts", "no-columns", "all-padding"],
)
def test_nothing_to_pack(mask: torch.Tensor) -> None:
    packing = Packing.from_mask(mask)
    x = torch.randn(*mask.shape, 5, requires_grad=True)
    packed = packing.pack(x)
    assert packed.shape == (0, 5)
    assert packing.total == 0 and packing.cu_seqlens.tolist() == [0] * (mask.shape[0] + 1)
    assert packing.unpack(packed, fill=7.0).shape == x.shape
    assert packing.first(packed).tolist() == [[0.0] * 5] * mask.shape[0] or mask.shape[0] == 0
    packing.unpack(packed).sum().backward()
    assert x.grad is not None and not x.grad.any()


def test_pack_unpack_values_fill_and_gradient() -> None:
    packing = Packing.from_mask(torch.tensor(HOLES))
    x = torch.arange(12.0).reshape(3, 4).requires_grad_()
    packed = packing.pack(x)
    assert packed.tolist() == [0.0, 2.0, 3.0, 9.0]
    padded = packing.unpack(packed, fill=-1.0)
    assert padded.tolist() == [[0, -1, 2, 3], [-1, -1, -1, -1], [-1, 9, -1, -1]]
    weight = torch.arange(12.0).reshape(3, 4) * 10
    (padded * weight).sum().backward()
    assert x.grad.tolist() == [[0, 0, 20, 30], [0, 0, 0, 0], [0, 90, 0, 0]]


def test_unpack_keeps_dtype_and_trailing_dimensions() -> None:
    packing = Packing.from_lengths([1, 2])
    ids = packing.unpack(torch.tensor([[5, 6], [7, 8], [9, 10]]), fill=-100)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[[5, 6], [-100, -100]], [[7, 8], [9, 10]]]


def test_first_token_is_the_first_real_one_and_zero_for_an_empty_text() -> None:
    packing = Packing.from_mask(torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0]]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    first = packing.first(x)
    assert first.tolist() == [1.0, 0.0, 3.0, 0.0]
    first.sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert Packing.from_lengths([2, 1]).first(torch.tensor([1, 2, 3])).tolist() == [1, 3]
    assert Packing.full(2, 2).first(torch.tensor([1, 2, 3, 4])).tolist() == [1, 3]


def test_gradcheck() -> None:
    packing = Packing.from_mask(torch.tensor([[1, 0, 1], [0, 0, 0]]))
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: packing.unpack(packing.pack(t).sin()), (x,))
    assert torch.autograd.gradcheck(lambda t: packing.first(packing.pack(t)), (x,))


def test_random_masks_agree_with_nonzero() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        mask = torch.rand(int(torch.randint(1, 6, ())), int(torch.randint(1, 40, ()))) < 0.6
        packing = Packing.from_mask(mask)
        assert torch.equal(packing.indices, mask.flatten().nonzero().flatten())
        assert packing.lengths == tuple(mask.sum(1).tolist())


def test_full_compiles_in_one_graph_and_sizes_may_change() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        packing = Packing.full(x.shape[0], x.shape[1], x.device)
        return packing.unpack(packing.pack(x) + packing.columns[:, None] + packing.cu_seqlens[-1])

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 3, 4), (5, 2, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.gpu
def test_one_wait_for_the_device() -> None:
    mask = torch.tensor(HOLES, device="cuda")
    Packing.from_mask(mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            Packing.from_mask(mask)  # the lengths have to be read
        packing = Packing.full(2, 3, "cuda")
        packing.unpack(packing.pack(torch.ones(2, 3, device="cuda")))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(Packing.from_mask(mask).indices.cpu(), Packing.from_mask(mask.cpu()).indices)


ERRORS = {
    "mask-kind": (
        lambda: Packing.from_mask([[1]]),
        TypeError,
        "attention_mask is a list; expected a torch.Tensor",
    ),
    "mask-4d": (
        lambda: Packing.from_mask(torch.ones(2, 1, 3, 3)),
        ValueError,
        "attention_mask has shape (2, 1, 3, 3); expected (batch, seqlen). Masks that differ by query",
    ),
    "mask-complex": (
        lambda: Packing.from_mask(torch.ones(1, 1, dtype=torch.complex64)),
        TypeError,
        "attention_mask has dtype torch.complex64; expected bool",
    ),
    "mask-additive": (
        lambda: Packing.from_mask(torch.tensor([[0.0, -10000.0]])),
        ValueError,
        "attention_mask holds other values than 0 and 1; expected 1 for a token, 0 for padding.",
    ),
    "mask-nan": (
        lambda: Packing.from_mask(torch.tensor([[float("nan")]])),
        ValueError,
        "other values than 0 and 1",
    ),
    "lengths-float": (
        lambda: Packing.from_lengths(torch.tensor([1.0])),
        TypeError,
        "lengths has dtype torch.float32; expected int64 or int32.",
    ),
    "lengths-text": (
        lambda: Packing.from_lengths(["a"]),
        TypeError,
        "lengths is ['a']; expected integers.",
    ),
    "lengths-shape": (
        lambda: Packing.from_lengths(torch.ones(1, 2, dtype=torch.int64)),
        ValueError,
        "lengths has shape (1, 2); expected (batch,).",
    ),
    "lengths-long": (
        lambda: Packing.from_lengths([1, 5], seqlen=4),
        ValueError,
        "lengths holds 5; expected values in 0..4 (seqlen).",
    ),
    "lengths-negative": (
        lambda: Packing.from_lengths([1, -2], seqlen=4),
        ValueError,
        "lengths holds -2; expected values in 0..4 (seqlen).",
    ),
    "pack-shape": (
        lambda: Packing.full(2, 3).pack(torch.ones(3, 2, 5)),
        ValueError,
        "ctxfast.Packing.pack: x has shape (3, 2, 5); expected (batch, seqlen, ...) = (2, 3, ...).",
    ),
    "pack-device": (
        lambda: Packing.full(1, 1).pack(torch.ones(1, 1, device="meta")),
        ValueError,
        "ctxfast.Packing.pack: x is on meta; expected cpu, where the packing is.",
    ),
    "unpack-shape": (
        lambda: Packing.full(2, 3).unpack(torch.ones(5, 2)),
        ValueError,
        "ctxfast.Packing.unpack: x_packed has shape (5, 2); expected (tokens, ...) = (6, ...).",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value)
    assert str(caught.value).startswith("ctxfast.Packing")
