# SPDX-License-Identifier: Apache-2.0
"""``char_cnn``'s CUDA kernels on the emulator, forward and backward, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import emulated, parity
from torch import Tensor

from ctxfast._core import registry
from ctxfast.ops.char_cnn import cases, cuda

pytestmark = pytest.mark.slow  # the kernels are compiled first, a minute
SPEC = registry.OPS["char_cnn"]
CASES = {case.id: case for case in cases.CASES if case.id != "large"}
SEED = 3


def _run(function: Any, kwargs: dict[str, Any], with_gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Output and, if wanted, the gradients of every floating input."""
    kwargs = parity.converted(kwargs, lambda tensor: tensor.detach().clone().requires_grad_(with_gradients))
    leaves = parity.flat([kwargs[name] for name in ("char_embeddings", "conv_weights", "conv_biases")])
    output = function(**parity.arguments("char_cnn", kwargs))
    if not with_gradients:
        return [output], []
    grad = parity.grad_outputs([output])[0]
    return [output.detach()], list(torch.autograd.grad(output, leaves, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    kwargs = case.make("cpu", dtype, SEED)
    with_gradients = dtype in case.grad_dtypes
    reference, reference_grads = _run(SPEC.reference, kwargs, with_gradients)
    oracle, oracle_grads = _run(SPEC.reference, parity.wide(kwargs), with_gradients)
    with emulated.kernels(monkeypatch, cuda, seed=1):
        outputs, grads = _run(cuda.char_cnn, kwargs, with_gradients)
        plain, _ = _run(cuda.char_cnn, kwargs, False)
    assert torch.equal(outputs[0], plain[0])
    ceiling = SPEC.ceiling[dtype]
    parity.check("output", outputs[0], reference[0], oracle[0], dtype, ceiling, parity.FORWARD)
    assert len(grads) == len(oracle_grads)
    for i, (got, plain, right) in enumerate(zip(grads, reference_grads, oracle_grads)):
        parity.check(f"gradient {i}", got, plain, right, dtype, ceiling, parity.GRADIENT)


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = next(iter(CASES.values())).make("cpu", torch.float32, SEED)

    def second(function: Any) -> list[Tensor]:
        leaves = parity.converted(kwargs, lambda tensor: tensor.detach().clone().requires_grad_())
        flat = parity.flat([leaves[name] for name in ("char_embeddings", "conv_weights", "conv_biases")])
        output = function(**parity.arguments("char_cnn", leaves))
        first = torch.autograd.grad(output.square().sum(), flat, create_graph=True)
        return [*first, *torch.autograd.grad(sum(grad.square().sum() for grad in first), flat)]

    with emulated.kernels(monkeypatch, cuda, seed=1):
        found = second(cuda.char_cnn)
    for one, two in zip(found, second(SPEC.reference)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_depend_on_the_word_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = parity.arguments("char_cnn", CASES["padded"].make("cpu", dtype, SEED))
    with torch.no_grad():
        found = []
        for seed in (0, 1, 2):
            with emulated.kernels(monkeypatch, cuda, seed=seed):
                found.append(cuda.char_cnn(**kwargs))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        with emulated.kernels(monkeypatch, cuda):
            backwards = cuda.char_cnn(**{**kwargs, "char_ids": kwargs["char_ids"].flip(0)})
    assert torch.equal(backwards.flip(0), found[0])


@torch.no_grad()
def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parity.arguments("char_cnn", CASES["tiny"].make("cpu", torch.float32, SEED))
    with emulated.kernels(monkeypatch, cuda):
        calls = cuda.raw_calls(args)
        assert {operator for operator, _ in calls} == {cuda._fwd, cuda._bwd}
        for operator, operands in calls:
            checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            assert set(torch.library.opcheck(operator, operands, test_utils=checks).values()) == {"SUCCESS"}


def test_a_character_outside_the_table_stops_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = parity.arguments("char_cnn", CASES["tiny"].make("cpu", torch.float32, SEED))
    kwargs["char_ids"][2, 3] = 9
    with emulated.kernels(monkeypatch, cuda), torch.no_grad(), pytest.raises(RuntimeError, match="ctxfast.char_cnn"):
        cuda.char_cnn(**kwargs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(), "it runs on a CUDA GPU and char_embeddings is on cpu."),
        (dict(dtype=torch.float64), "it takes float32, float16 and bfloat16 and char_embeddings is torch.float64."),
        (dict(widths=17), "it takes filters of at most 16 widths and there are 17."),
        (dict(D=0), "there is nothing to multiply in characters without numbers."),
        (dict(D=400), "it keeps 64 filters and a word in shared memory: here 208000 bytes, and it has 98304."),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    class OnGpu:
        """A table that says it lies on a GPU: `supports` looks at facts only."""

        def __init__(self, size: int, dtype: torch.dtype, device: str) -> None:
            self.shape, self.dtype, self.device = torch.Size((9, size)), dtype, torch.device(device)

    size = change.get("D", 4)
    args = dict(
        char_ids=torch.zeros(2, 59, dtype=torch.int64),
        char_embeddings=OnGpu(size, change.get("dtype", torch.float32), "cuda" if change else "cpu"),
        conv_weights=[torch.empty(3, size, 1)] * change.get("widths", 1),
    )
    assert cuda.supports(args) == words
