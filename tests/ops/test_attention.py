# SPDX-License-Identifier: Apache-2.0
"""``attention`` in Triton: ragged shapes at random, dropout masks read out and differentiated, every plan of tiles."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import attention_masks
from support.parity import FORWARD, GRADIENT, check, gradients, run, wide
from torch.nn.attention import SDPBackend

import ctxfast
from ctxfast._core import capability, registry

if not torch.cuda.is_available() and not capability.is_triton_interpreted():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from ctxfast.nn import SelfAttention, encoder
from ctxfast.ops.attention import triton as attention_triton, triton_blocks, triton_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SPEC = registry.OPS["attention"]
ROOT = Path(__file__).resolve().parents[2]


def _packed(lengths: list[int], H: int, D: int, dtype: torch.dtype, seed: int = 0) -> dict:
    return attention_masks.packed(lengths, H, D, dtype, DEVICE, seed)


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
def test_ragged_batch_whose_blocks_are_listed(dtype) -> None:
    """One long sequence among short and empty ones, at the ends too; every block must find its program."""
    lengths = [0, 1, 0, 170, 64, 0, 3, 63, 2, 65, 0]
    for size in (32, 64):
        assert triton_plan.grid(sum(lengths), len(lengths), max(lengths), size).has_table
    _compare(_packed(lengths, 2, 32, dtype))


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_table_of_blocks(offsets_dtype) -> None:
    """All blocks of all sequences once, the longest sequences' first, then rows of length 0 that nobody works on."""
    drawn = random.Random(0)
    for sequences in (1, 2, 15, 16, 17, 40, 150):
        lengths = [drawn.choice([0, 1, 64, 65, drawn.randint(0, 300)]) for _ in range(sequences)]
        size = drawn.choice([16, 32, 64])
        starts = [sum(lengths[:i]) for i in range(sequences + 1)]
        programs = triton_plan.grid(starts[-1], sequences, 4096, size).programs
        offsets = torch.tensor(starts, dtype=offsets_dtype, device=DEVICE)
        table = triton_blocks.block_table(offsets, programs, size).tolist()
        expected = [
            [sequence, first, starts[sequence], lengths[sequence]]
            for sequence in sorted(range(sequences), key=lambda i: -lengths[i])
            for first in range(0, lengths[sequence], size)
        ]
        assert table[: len(expected)] == expected
        assert all(row[3] == 0 for row in table[len(expected) :])


def test_grid_holds_every_block() -> None:
    drawn = random.Random(0)
    for _ in range(2000):
        lengths = [drawn.choice([0, 1, drawn.randint(0, 300)]) for _ in range(drawn.randint(1, 40))]
        size = drawn.choice([16, 32, 64])
        grid = triton_plan.grid(sum(lengths), len(lengths), max(lengths), size)
        assert grid.programs >= sum(-(-length // size) for length in lengths)
        assert grid.has_table or grid.programs == -(-max(lengths) // size) * len(lengths)


@pytest.mark.slow
def test_layers_of_a_pass_share_a_table(monkeypatch) -> None:
    """It is made by the first and lives no longer than the pass: the next one may find other lengths in its place."""
    calls = []
    plain = triton_blocks.list_blocks

    class Counted:
        def __getitem__(self, grid):
            calls.append(grid)
            return plain[grid]

    monkeypatch.setattr(triton_blocks, "list_blocks", Counted())
    layers = [SelfAttention(64, 2, impl="triton", device=DEVICE, dtype=torch.float32) for _ in range(3)]
    offsets = torch.tensor([0, 170, 171, 172, 173, 174], dtype=torch.int32, device=DEVICE)
    x = torch.randn(174, 64, device=DEVICE)
    for lengths in ([170, 1, 1, 1, 1], [3, 168, 1, 1, 1]):
        calls.clear()
        offsets.copy_(torch.tensor([0, *lengths]).cumsum(0))
        with torch.no_grad():
            got = encoder.run(layers, x, offsets, 170)[0]
        assert len(calls) == 1
        with ctxfast.use_impl("reference"), torch.no_grad():
            expected = x
            for layer in layers:
                expected = ctxfast.functional.attention(
                    ctxfast.functional.linear_act(expected, *layer.qkv()).unflatten(-1, (3, 2, 32)), offsets, 170,
                    impl="reference",
                ).flatten(1)  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    calls.clear()
    encoder.run(layers, x, offsets, 170)[0].sum().backward()
    assert len(calls) == 1  # the backward finds the forward's
    with torch.no_grad():
        layers[0](x, offsets, 170)
        layers[0](x, offsets, 170)
    assert len(calls) == 3  # calls that belong together in nobody's knowledge


def test_bias_is_added_once_and_rounded_with_the_rows() -> None:
    kwargs = _packed([40, 3], 2, 32, torch.float16)
    expected = run("attention", {**kwargs, "qkv": kwargs["qkv"] + kwargs["bias"], "bias": None}, "triton")[0]
    assert torch.equal(run("attention", kwargs, "triton")[0], expected)


def test_full_batches_may_be_sdpas(monkeypatch) -> None:
    """Where the table says so, without dropout and gradients alone; off a GPU its plain form stands in for cuDNN's."""
    assert not triton_plan.FULL_BY_SDPA  # no GPU has measured it
    calls = []
    full, ragged = _packed([70, 70, 70], 2, 32, torch.float16), _packed([70, 69, 71], 2, 32, torch.float16)
    own = run("attention", full, "triton")[0]
    if DEVICE == "cpu":
        monkeypatch.setattr(attention_triton, "_SDPA", SDPBackend.MATH)
    table = {major: lambda *sizes: calls.append(sizes) or True for major in (8, 9)}
    monkeypatch.setattr(triton_plan, "FULL_BY_SDPA", table)
    got = run("attention", full, "triton")[0]
    assert calls == [(3, 70, 2, 32)] and got.is_contiguous()
    assert torch.equal(got, run("attention", full, "triton")[0])
    plain, right = (run("attention", given, "reference")[0] for given in (full, wide(full)))
    check("output", got, plain, right, torch.float16, SPEC.ceiling[torch.float16], FORWARD)
    calls.clear()
    _compare(full)  # with gradients
    run("attention", ragged, "triton")
    run("attention", {**full, "max_seqlen": 80}, "triton")
    run("attention", {**full, "softmax_scale": -0.3}, "triton")
    run("attention", {**full, "qkv": full["qkv"].float(), "bias": full["bias"].float()}, "triton")
    torch.manual_seed(0)
    first = ctxfast.attention(**full, dropout_p=0.5, impl="triton")
    torch.manual_seed(0)
    assert torch.equal(first, ctxfast.attention(**full, dropout_p=0.5, impl="triton"))
    assert not torch.equal(first, own)
    assert not calls


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


@pytest.mark.parametrize(
    "lengths",
    [[13, 9], [60, 7], *(pytest.param(each, marks=pytest.mark.slow) for each in ([29, 2], [110, 90], [140]))],
    ids=lambda value: str(max(value)),
)
def test_dropout_mask_and_gradients(lengths) -> None:
    attention_masks.check_gradients(lengths, "triton", DEVICE)


def test_dropout_mask_does_not_depend_on_tiles() -> None:
    """Every kernel counts alike: a longer max_seqlen or another dtype takes other tiles and draws the same mask."""
    lengths = [15, 4]
    first = attention_masks.read(lengths, 0.4, 1, "triton", DEVICE)
    for max_seqlen, dtype in ((15, torch.float16), (30, torch.float32), (60, torch.float16), (300, torch.float32)):
        other = attention_masks.read(lengths, 0.4, 1, "triton", DEVICE, dtype=dtype, max_seqlen=max_seqlen)
        for one, two in zip(first, other):
            assert torch.equal(one > 0, two > 0)


def test_dropout_masks_are_independent() -> None:
    attention_masks.check_independence("triton", DEVICE)


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


@pytest.mark.slow
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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_kernels_do_not_spill() -> None:
    """BERT-Base's kernels for an H100, compiled without one; ``make resources`` does all of the table."""
    script = ROOT / "csrc" / "triton_resources.py"
    rows = "sm_90 bfloat16 attention D=64 dropout"
    done = subprocess.run(
        [sys.executable, script, "--only", rows], capture_output=True, text=True, timeout=600, check=False
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
