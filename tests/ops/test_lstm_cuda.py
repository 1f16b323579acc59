# SPDX-License-Identifier: Apache-2.0
"""What the persistent ``lstm`` says about calls it cannot run, and that torch.compile can ask it. On the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import emulated

from ctxfast._core import capability
from ctxfast.ops.lstm import cuda, cuda_autograd

pytestmark = pytest.mark.slow  # the emulator is compiled first, minutes
H100 = (132, 9, 0, 227 * 1024, True, 66)


@pytest.fixture(autouse=True)
def _emulator(monkeypatch: pytest.MonkeyPatch) -> Any:
    both = emulated.Instead(emulated.extension())
    monkeypatch.setattr(capability, "extension", lambda: both)
    asked = (cuda._facts, capability._cuda_versions)
    for facts in asked:
        facts.cache_clear()
    yield
    for facts in asked:
        facts.cache_clear()


def _args(
    B: int, H: int, P: int | None = None, R: int = 2, T: int = 3, requires_grad: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a call that is never made: the weights have shapes and no memory."""
    size = H if P is None else P

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta", requires_grad=requires_grad)

    return dict(
        input=(torch.empty(B, T, 8, dtype=torch.float16),) * R,
        weight_hh=tuple(weight(4 * H, size) for _ in range(R)),
        weight_proj=None if P is None else tuple(weight(P, H) for _ in range(R)),
    )


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(batch, sizes) for batch in (1, 8, 9, 32) for sizes in ((4096, 512), (2048, 256), (1024, 128))]
    + [(batch, (size,)) for batch in (1, 8, 9, 32, 33, 128) for size in (128, 256, 512, 768, 1024)],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_takes_the_sizes_it_is_made_for(batch: int, sizes: tuple[int, ...], requires_grad: bool) -> None:
    assert cuda.sizes_objection(_args(batch, *sizes, requires_grad=requires_grad)) is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (_args(129, 512), "without a projection it takes at most 128 rows and input has 129."),
        (_args(33, 4096, 512), "with a projection it takes at most 32 rows and input has 33."),
        (_args(0, 512), "it needs a row and a step and input has 0 rows of 3 steps."),
        (_args(2, 512, T=0), "it needs a row and a step and input has 2 rows of 0 steps."),
        (_args(2, 500), "it takes sizes in multiples of 32, not hidden_size 500 and proj_size 500."),
        (_args(2, 2048), "the weights of hidden_size 2048 and proj_size 2048 in 2 directions do not fit on the chip"),
        (_args(2, 96, requires_grad=True), "backwards, without a projection it takes hidden_size 128 to 1024"),
    ],
)
def test_refusals_are_sentences(args: dict[str, Any], says: str) -> None:
    assert cuda.sizes_objection(args).startswith(says)


@pytest.mark.parametrize(
    ("facts", "sizes", "says"),
    [
        ((132, 8, *H100[2:]), (512,), "it needs a Hopper GPU (compute capability 9.0) and this one has 8.0."),
        ((60, *H100[1:]), (4096, 512), "the weights of hidden_size 4096 and proj_size 512 in 2 directions do not fit"),
        ((*H100[:4], False, 66), (512,), "this device has no cooperative launch (all blocks resident at once)."),
        ((132, 9, 0, 99 * 1024, True, 66), (4096, 512), "the weights of hidden_size 4096 and proj_size 512"),
    ],
    ids=["other GPU", "part of a GPU", "no cooperative launch", "little shared memory"],
)
def test_refuses_devices(
    facts: tuple[Any, ...], sizes: tuple[int, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_facts", lambda ordinal: facts)
    assert cuda.sizes_objection(_args(2, *sizes)).startswith(says)


def test_refuses_the_cpu() -> None:
    args = dict(_args(2, 512), weight_dtype=None)
    assert cuda.supports(args) == "it runs on a CUDA GPU and input is on cpu."


@pytest.mark.parametrize("archs", [["80", "86", "86+PTX"], ["80", "90a", "90+PTX"]])
def test_refuses_builds_without_its_kernels(archs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They have CUDA, and no binding of these kernels that could be asked."""
    monkeypatch.setattr(capability, "build_info", lambda: {"cuda": True, "cuda_archs": archs})
    monkeypatch.setattr(cuda.cuda_autograd, "objection", lambda *args: capability.why_no_cuda())
    says = cuda.supports(_args(2, 512))
    if "90a" in archs:
        assert says is None
    else:
        assert says == "CUDA kernels were compiled for 80, 86, 86+PTX; rebuild with CTXFAST_CUDA_ARCHS holding 90a."


def test_refuses_a_driver_older_than_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every launch would fail: the runtime is linked in, and may be newer than torch's."""
    monkeypatch.setattr(capability, "build_info", lambda: {"cuda": True, "cuda_archs": ["90a"]})
    for driver, runtime, old in ((12080, 13000, True), (13000, 13010, False), (13020, 12080, False), (0, 13000, False)):
        monkeypatch.setattr(capability, "_cuda_versions", lambda versions=(driver, runtime): versions)
        says = capability.why_no_cuda("90a")
        assert (says is not None) == old
        if old:
            assert says.startswith("CUDA kernels were compiled with CUDA 13.0 and this machine's driver knows CUDA")


def test_the_emulator_answers_with_cuda_versions() -> None:
    driver, runtime = capability.extension().cuda_versions()
    assert driver >= runtime >= 12000


def test_a_compiled_graph_asks_at_compile_time() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x: torch.Tensor, hh: torch.Tensor) -> torch.Tensor:
        args = dict(input=(x,), weight_hh=(hh,), weight_proj=None)
        return x + 1 if cuda.sizes_objection(args) is None else x - 1

    x = torch.zeros(2, 3, 8)
    assert chosen(x, torch.zeros(512, 128))[0, 0, 0] == 1
    assert chosen(x, torch.zeros(400, 100))[0, 0, 0] == -1


def test_gates_and_weights_are_read_where_they_lie() -> None:
    gates = cuda_autograd.input_gates(torch.randn(2, 3, 8).half(), torch.randn(64, 8).half(), None)
    assert gates.shape == (2, 3, 16, 4) and cuda._walkable(gates).data_ptr() == gates.data_ptr()
    copied = cuda._walkable(gates.contiguous())
    assert copied.stride()[2:] == (1, 16) and torch.equal(copied, gates)
    wide = torch.randn(4, 24).half()
    assert cuda._dense_rows(wide[:, :16]).data_ptr() == wide.data_ptr()
    for awkward in (wide[:, 1:17], wide.t()[:8], torch.randn(4, 20).half()[:, :16]):
        dense = cuda._dense_rows(awkward)
        assert dense.is_contiguous() and dense.data_ptr() % 16 == 0 and torch.equal(dense, awkward)
