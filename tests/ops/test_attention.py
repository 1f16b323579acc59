# SPDX-License-Identifier: Apache-2.0
"""``attention`` in Triton: ragged shapes at random, dropout masks read out and differentiated, every plan of tiles."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import FORWARD, GRADIENT, check, gradients, run, wide
from torch import Tensor

import ctxfast
from ctxfast._core import capability, registry

if not torch.cuda.is_available() and not capability.is_triton_interpreted():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from ctxfast.ops.attention import triton_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SPEC = registry.OPS["attention"]
ROOT = Path(__file__).resolve().parents[2]


def _packed(lengths: list[int], H: int, D: int, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return dict(
        qkv=torch.randn(sum(lengths), 3, H, D, generator=generator).to(DEVICE, dtype),
        cu_seqlens=offsets.to(DEVICE),
        max_seqlen=max(lengths, default=0),
        bias=(0.3 * torch.randn(3, H, D, generator=generator)).to(DEVICE, dtype),
    )


def _compare(kwargs: dict, names: tuple[str, ...] = ("qkv", "bias")) -> None:
    """Result and gradients by the parity rule."""
    dtype = kwargs["qkv"].dtype
    ceiling = SPEC.ceiling[dtype]
    mine, mine_grads, given = gradients("attention", kwargs, names, "triton")
    plain, plain_grads, _ = gradients("attention", kwargs, names, "reference", given)
    right, right_grads, _ = gradients("attention", wide(kwargs), names, "reference", given)
    check("output", mine[0], plain[0], right[0].detach(), dtype, ceiling, FORWARD)
    for (name, one), (_, two), (_, three) in zip(mine_grads, plain_grads, right_grads):
        check(f"gradient of {name}", one, two, three, dtype, ceiling, GRADIENT)


@pytest.mark.parametrize("seed", range(12))
def test_ragged_shapes_at_random(seed) -> None:
    drawn = random.Random(seed)
    longest = drawn.choice([4, 16, 17, 32, 33, 64, 65, 100, 128, 150])
    lengths = [drawn.choice([0, 1, 2, longest, drawn.randint(0, longest)]) for _ in range(drawn.randint(1, 5))]
    kwargs = _packed(
        lengths, drawn.choice([1, 2, 3]), drawn.choice([8, 32, 48, 64, 128]),
        drawn.choice([torch.float32, torch.float16]), seed,
    )  # fmt: skip
    kwargs["max_seqlen"] += drawn.choice([0, 0, 5])
    if drawn.random() < 0.3:
        kwargs["bias"] = None
    if drawn.random() < 0.3:
        kwargs["softmax_scale"] = drawn.choice([0.7, -0.4])
    _compare(kwargs, ("qkv",) if kwargs["bias"] is None else ("qkv", "bias"))


def test_a_thousand_short_sequences() -> None:
    kwargs = _packed([i % 4 + 1 for i in range(1000)], 1, 16, torch.float32)
    got, reference, right = (
        run("attention", given, impl)[0]
        for given, impl in ((kwargs, "triton"), (kwargs, "reference"), (wide(kwargs), "reference"))
    )
    check("output", got, reference, right, torch.float32, SPEC.ceiling[torch.float32], FORWARD)


@pytest.mark.parametrize(
    "lengths", [[16, 3], [32, 1], [64, 5], [128, 127], [70, 1, 1], [200]], ids=lambda lengths: f"up-to-{max(lengths)}"
)
@pytest.mark.parametrize("D", [32, 64])
def test_every_plan(lengths, D) -> None:
    """Each row of the table, ragged enough at the end for the looped kernels."""
    _compare(_packed(lengths, 2, D, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_ragged_batch_that_searches_its_blocks(dtype) -> None:
    """One long sequence among short and empty ones, at the ends too; every row must find its program."""
    lengths = [0, 1, 0, 170, 64, 0, 3, 63, 2, 65, 0]
    for size in (32, 64):
        assert triton_plan.grid(sum(lengths), len(lengths), max(lengths), size).search == 32
    _compare(_packed(lengths, 2, 32, dtype))


def test_grid_holds_every_block() -> None:
    """Sequence i begins at block start // size + i: what the kernels count on, for thousands of random batches."""
    drawn = random.Random(0)
    for _ in range(2000):
        lengths = [drawn.choice([0, 1, drawn.randint(0, 300)]) for _ in range(drawn.randint(1, 40))]
        size = drawn.choice([16, 32, 64])
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        begins = [start // size + i for i, start in enumerate(starts)]
        grid = triton_plan.grid(sum(lengths), len(lengths), max(lengths), size)
        programs = sum(lengths) // size + len(lengths)
        assert grid.programs == (programs if grid.search else -(-max(lengths) // size) * len(lengths))
        assert not grid.search or grid.search >= len(lengths)
        for begin, end, length in zip(begins, [*begins[1:], programs], lengths):
            assert end - begin >= -(-length // size)


@pytest.mark.parametrize("length", [9, 20, 40, 70, 140])
def test_scores_far_below_zero(length) -> None:
    """exp2(-lse) is infinite here: what stands past a sequence's end must not be multiplied with it."""
    kwargs = _packed([length], 1, 32, torch.float32)
    kwargs["qkv"][:, 0] += 5
    kwargs["qkv"][:, 1] -= 5
    # Scores of this size are rounded too coarsely for the parity rule.
    mine, grads, given = gradients("attention", kwargs, ("qkv",), "triton")
    right, right_grads, _ = gradients("attention", wide(kwargs), ("qkv",), "reference", given)
    for one, two in ((mine[0], right[0]), (grads[0][1], right_grads[0][1])):
        torch.testing.assert_close(one.detach().cpu().double(), two.detach(), rtol=1e-3, atol=1e-3)


def test_plans_choose_by_length_and_filling() -> None:
    for kind, major in (("half", 9), ("half", 8), ("half", 10), ("float32", 9), ("tf32", 8)):
        for head_dim in (1, 16, 17, 32, 33, 64, 65, 128):
            table = triton_plan.plans(head_dim, kind, major)
            assert table[-1].longest == 0 and [plan.longest for plan in table[:-1]] == sorted(
                plan.longest for plan in table[:-1]
            )
            for longest in (1, 16, 17, 33, 65, 129, 4096):
                plan = triton_plan.choose(head_dim, kind, major, longest, longest)
                assert plan.longest >= longest or plan is table[-1]
                # A tile that is never looped over must hold the longest sequence.
                assert plan.whole is None or plan.whole.rows >= longest
                assert (plan.whole is None) == (plan.query is not None) == (plan.key is not None)
                assert not plan.forward.pairs or plan.forward.rows >= longest
    assert triton_plan.choose(64, "half", 9, 128, 100).longest == 128
    assert triton_plan.choose(64, "half", 9, 128, 40).longest == 0


def test_float32_takes_tensor_cores_only_when_allowed(monkeypatch) -> None:
    """torch's switches for float32 products, all three of them, are ours."""
    kwargs = _packed([20, 40], 2, 64, torch.float32)
    precisions = []
    plain = triton_plan.choose
    monkeypatch.setattr(triton_plan, "choose", lambda *args: precisions.append(args[1]) or plain(*args))
    matmul = torch.backends.cuda.matmul

    def found() -> str:
        precisions.clear()
        run("attention", kwargs, "triton")
        return precisions[0]

    try:
        assert found() == "float32"
        matmul.allow_tf32 = True
        assert found() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert found() == "float32"
        torch.set_float32_matmul_precision("high")
        assert found() == "tf32"
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "ieee"
            assert found() == "float32"
            matmul.fp32_precision = "tf32"
            assert found() == "tf32"
    finally:
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert not matmul.allow_tf32 and found() == "float32"


# dropout


def _mask(lengths: list[int], H: int, p: float, seed: int, max_seqlen: int, dtype: torch.dtype) -> list[Tensor]:
    """Share of every weight that dropout leaves, (H, length, length) per sequence: 0 or 1 / (1 - p).

    Equal scores, and values that are the columns of a unit matrix: the result is the weights themselves.
    """
    D = 64
    parts = []
    for first in range(0, max(lengths), D):
        qkv = torch.zeros(sum(lengths), 3, H, D, device=DEVICE, dtype=dtype)
        at = 0
        for length in lengths:
            for key in range(first, min(first + D, length)):
                qkv[at + key, 2, :, key - first] = 1
            at += length
        offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
        torch.manual_seed(seed)
        with torch.no_grad():
            parts.append(ctxfast.attention(qkv, offsets, max_seqlen, dropout_p=p, impl="triton").float())
    weights = torch.cat(parts, dim=2)
    found, at = [], 0
    for length in lengths:
        found.append(weights[at : at + length, :, :length].transpose(0, 1) * length)
        at += length
    return found


@pytest.mark.parametrize("lengths", [[13, 9], [29, 2], [60, 7], [110, 90], [140]], ids=lambda value: str(max(value)))
def test_dropout_mask_and_gradients(lengths) -> None:
    """The mask read out of the forward, put into plain PyTorch, gives the result and the gradients."""
    H, p, seed = 2, 0.3, 5
    masks = _mask(lengths, H, p, seed, max(lengths), torch.float16)
    kept = torch.cat([(mask > 0).float().flatten() for mask in masks])
    assert abs(float(kept.mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    for mask in masks:
        torch.testing.assert_close(mask[mask > 0], torch.full_like(mask[mask > 0], 1 / (1 - p)), rtol=2e-3, atol=0)

    kwargs = _packed(lengths, H, 32, torch.float32)
    qkv, bias = kwargs["qkv"].requires_grad_(), kwargs["bias"].requires_grad_()
    torch.manual_seed(seed)
    got = ctxfast.attention(**kwargs, dropout_p=p, impl="triton")
    grad = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, (qkv, bias), grad)

    wide_qkv, wide_bias = (tensor.detach().double().requires_grad_() for tensor in (qkv, bias))
    expected = []
    for rows, mask in zip((wide_qkv + wide_bias).split(lengths), masks):
        query, key, value = rows.permute(1, 2, 0, 3)
        weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(32), dim=-1)
        expected.append(((weights * (mask > 0).double() / (1 - p)) @ value).transpose(0, 1))
    expected = torch.cat(expected)
    right = torch.autograd.grad(expected, (wide_qkv, wide_bias), grad.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    for one, two in zip(got_grads, right):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=2e-5 * float(two.abs().max()))


def test_dropout_mask_does_not_depend_on_tiles() -> None:
    """Every kernel counts alike: a longer max_seqlen or another dtype takes other tiles and draws the same mask."""
    lengths = [15, 4]
    first = _mask(lengths, 2, 0.4, 1, 15, torch.float32)
    for max_seqlen, dtype in ((15, torch.float16), (30, torch.float32), (60, torch.float16), (300, torch.float32)):
        for one, two in zip(first, _mask(lengths, 2, 0.4, 1, max_seqlen, dtype)):
            assert torch.equal(one > 0, two > 0)


def test_dropout_masks_are_independent() -> None:
    """Neighbouring weights, heads, sequences and calls: what eight weights of one draw share must not show."""
    mask = torch.stack(_mask([48, 48], 2, 0.5, 3, 48, torch.float32)) > 0  # (sequence, head, query, key)
    other = torch.stack(_mask([48, 48], 2, 0.5, 4, 48, torch.float32)) > 0
    signs = mask.float() * 2 - 1
    pairs = {
        "next key": (signs[..., 1:], signs[..., :-1]),
        "key 8 further": (signs[..., 8:], signs[..., :-8]),
        "next query": (signs[..., 1:, :], signs[..., :-1, :]),
        "query 8 further": (signs[..., 8:, :], signs[..., :-8, :]),
        "key and query swapped": (signs, signs.transpose(-1, -2)),
        "head": (signs[:, 0], signs[:, 1]),
        "sequence": (signs[0], signs[1]),
        "call": (signs, other.float() * 2 - 1),
    }
    for what, (one, two) in pairs.items():
        product = one * two
        if what == "key and query swapped":
            product = product[..., ~torch.eye(48, dtype=torch.bool, device=DEVICE)]
        assert abs(float(product.mean())) < 5 / math.sqrt(product.numel()), what


def test_dropout_near_one_stays_finite() -> None:
    kwargs = _packed([9, 40], 1, 16, torch.float32)
    assert torch.isfinite(ctxfast.attention(**kwargs, dropout_p=0.99999, impl="triton")).all()


# layouts, refusals, compilation


def test_padded_and_permuted_memory() -> None:
    """Rows with gaps, heads before tokens, and gradients that start from them."""
    kwargs = _packed([40, 3, 70], 2, 32, torch.float32)
    gaps = torch.full((113, 3, 2, 40), float("nan"), device=DEVICE)
    gaps[..., 4:36] = kwargs["qkv"]
    heads_first = kwargs["qkv"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    expected = run("attention", kwargs, "triton")[0]
    for qkv in (gaps[..., 4:36], heads_first):
        torch.testing.assert_close(run("attention", {**kwargs, "qkv": qkv}, "triton")[0], expected)
        _compare({**kwargs, "qkv": qkv})


def test_only_the_bias_wants_a_gradient() -> None:
    kwargs = _packed([20, 5], 2, 32, torch.float32)
    _compare(kwargs, ("bias",))
    _compare(kwargs, ("qkv",))


def test_refusals_say_why() -> None:
    kwargs = _packed([4], 1, 160, torch.float32)
    with pytest.raises(RuntimeError, match="it takes heads of at most 128 and head_dim is 160."):
        ctxfast.attention(**kwargs, impl="triton")
    with pytest.raises(RuntimeError, match="it takes float32, float16 and bfloat16 and qkv is torch.float64."):
        ctxfast.attention(**wide(kwargs), impl="triton")


@pytest.mark.parametrize(("D", "filled"), [(8, 16), (48, 64), (80, 128), (32, None), (64, None), (128, None)])
def test_explain_says_which_heads_are_filled_up(D, filled) -> None:
    found = ctxfast.explain("attention", **_packed([3], 1, D, torch.float32))
    (row,) = [row for row in found.rows if row[0] == "triton"]
    words = f"heads of {D} are filled up to {filled} on the chip: tiles of matrix units are powers of two"
    assert row[1] in ("could", "used")
    assert row[2].endswith(words) if filled else "filled up" not in row[2]


def test_first_call_may_be_compiled() -> None:
    """Triton is imported on first use, and that use may be torch.compile's trace."""
    code = (
        "import sys, torch, ctxfast\n"
        f"qkv = torch.randn(6, 3, 2, 16, device={DEVICE!r}, requires_grad=True)\n"
        f"offsets = torch.tensor([0, 2, 6], dtype=torch.int32, device={DEVICE!r})\n"
        "call = lambda qkv: ctxfast.attention(qkv, offsets, 4, dropout_p=0.1, impl='triton')\n"
        "assert 'ctxfast.ops.attention.triton' not in sys.modules\n"
        "torch.compile(call, fullgraph=True, backend='aot_eager')(qkv).sum().backward()\n"
        "assert torch.isfinite(qkv.grad).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kernels_do_not_spill() -> None:
    """BERT-Base's kernels for an H100, compiled without one; ``make resources`` does all of the table."""
    script = ROOT / "csrc" / "triton_resources.py"
    rows = "sm_90 bfloat16 attention D=64 dropout"
    done = subprocess.run(
        [sys.executable, script, "--only", rows], capture_output=True, text=True, timeout=900, check=False
    )
    # Registers may differ from the table's under another Triton; spills are looked for in any.
    found = [line.split() for line in done.stdout.splitlines() if line.startswith(rows)]
    assert len(found) == 11, done.stdout + done.stderr
    assert all(row[-1] == "0" and int(row[-2]) > 0 for row in found), done.stdout


def test_old_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    objection = capability.why_no_triton(torch.device("cuda", 0))
    assert objection == "it needs a GPU of compute capability 8.0 or newer and this one has 7.5."
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    assert capability.why_no_triton(torch.device("cuda", 0)) is None
