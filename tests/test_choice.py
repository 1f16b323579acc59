# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: impl= before use_impl before CTXFAST_IMPL before the table's order; never in silence."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ctxfast
from ctxfast._core import calls, capability, choice, registry

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, int]:
    return torch.randn(6, 3, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32), 4


def _used(qkv: tuple, **kwargs) -> str:
    return ctxfast.explain("attention", *qkv, **kwargs).used


def test_automatic_choice_takes_the_first_that_accepts(qkv) -> None:
    assert _used(qkv) == "cpu"
    assert _used((qkv[0].double(), *qkv[1:])) == "reference"


def test_order_of_precedence(qkv) -> None:
    with ctxfast.use_impl("reference"):
        assert _used(qkv) == "reference"
        assert _used(qkv, impl="cpu") == "cpu"
        with ctxfast.use_impl(attention="cpu"):
            assert _used(qkv) == "cpu"
        assert _used(qkv) == "reference"
    assert _used(qkv) == "cpu"


def test_op_name_goes_before_the_name_for_all(qkv) -> None:
    with ctxfast.use_impl("reference", attention="cpu"):
        assert _used(qkv) == "cpu"
        x = torch.randn(1, 2, 3)
        assert ctxfast.explain("lstm", x, torch.randn(8, 3), torch.randn(8, 2)).used == "reference"


def test_a_name_for_all_binds_only_ops_that_have_it(qkv) -> None:
    with ctxfast.use_impl("cpu"):
        assert _used(qkv) == "cpu"
        without = next(spec for spec in registry.OPS.values() if not any(impl.name == "cpu" for impl in spec.impls))
        assert ctxfast.explain(without.name, **without.cases()[0].make("cpu", torch.float32, 0)).used == "reference"


@pytest.mark.parametrize(
    ("name", "device", "ops", "reason"),
    [
        (None, "cpu", ("attention",), None),
        ("reference", "cpu", ("attention",), None),
        ("cpu", "cpu", ("attention",), None),
        ("cpu", "cpu", None, None),
        ("cuda", "cuda", ("attention", "lstm"), None),
        ("triton", "cuda", ("attention",), None),
        ("cuda", "cpu", None, "no op has an implementation 'cuda' for cpu; expected reference, cpu, or None"),
        ("cuda_step", "cuda", ("attention",), "none of the ops of this model (attention) has an implementation 'cuda_"),
        ("cpu", "cuda", None, "no op has an implementation 'cpu' for cuda; expected reference, triton, cuda"),
        ("triton", "cpu", None, "no op has an implementation 'triton' for cpu"),
    ],
)
def test_a_name_that_would_change_nothing_on_a_device(monkeypatch, name, device, ops, reason) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = choice.why_no_impl(name, torch.device(device), ops)
    assert found is None if reason is None else found.startswith(reason)


def test_use_impl_ends_with_its_block_even_after_an_error(qkv) -> None:
    with pytest.raises(KeyError):
        with ctxfast.use_impl("reference"):
            raise KeyError("inside")
    assert _used(qkv) == "cpu"
    assert choice.requested() == ()


def test_what_is_asked_for_never_falls_back(qkv) -> None:
    wide = (qkv[0].double(), *qkv[1:])
    objection = "it takes float32, bfloat16 and float16 and qkv is torch.float64."
    why = f"ctxfast.attention: impl='cpu' was asked for and cannot run this call: {objection} "
    with pytest.raises(RuntimeError) as error:
        ctxfast.attention(*wide, impl="cpu")
    assert str(error.value) == why + "Pass impl='reference', or leave impl out."
    with ctxfast.use_impl("cpu"), pytest.raises(RuntimeError) as error:
        ctxfast.attention(*wide)
    # A whole model may be asked to take an implementation that one of its calls cannot have.
    assert str(error.value) == why + "Choose for this op alone, as in use_impl('cpu', attention='reference')."
    with ctxfast.use_impl("cpu", attention="reference"):
        assert ctxfast.attention(*wide).dtype is torch.float64


def test_unknown_names_list_the_known_ones(qkv) -> None:
    with pytest.raises(
        ValueError, match=r"^ctxfast.attention: impl is 'fast'; expected one of cpu, triton, reference\.$"
    ):
        ctxfast.attention(*qkv, impl="fast")
    with pytest.raises(ValueError, match=r"^ctxfast.use_impl: impl is 'fast'; expected one of reference, cpu, triton"):
        ctxfast.use_impl("fast").__enter__()
    with pytest.raises(
        ValueError, match=r"^ctxfast.use_impl: there is no op 'atention'; expected one of add_layer_norm,"
    ):
        ctxfast.use_impl(atention="cpu").__enter__()
    with pytest.raises(ValueError, match=r"^ctxfast.explain: op is 'atention'; expected one of add_layer_norm, "):
        ctxfast.explain("atention")


def test_explain_has_a_reason_for_every_row(qkv) -> None:
    for spec in registry.OPS.values():
        kwargs = spec.cases()[0].make("cpu", torch.float32, 0)
        explanation = ctxfast.explain(spec.name, **kwargs)
        assert [name for name, _, _ in explanation.rows] == [impl.name for impl in spec.all_impls]
        assert sum(verdict == "used" for _, verdict, _ in explanation.rows) == 1
        for name, verdict, reason in explanation.rows:
            assert reason, name
            assert verdict != "no" or reason.endswith(".")
    text = str(ctxfast.explain("attention", qkv[0].double(), *qkv[1:]))
    assert text.splitlines()[0] == "ctxfast.attention:"
    assert "cpu        no     it takes float32" in text


def test_explain_checks_like_a_call(qkv) -> None:
    with pytest.raises(ValueError, match="max_seqlen is 3; expected at least 4"):
        ctxfast.explain("attention", qkv[0], qkv[1], 3)


def _in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if k != "CTXFAST_IMPL"}, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


_EXPLAIN = (
    "import torch, ctxfast; "
    "q = torch.randn(4, 3, 1, 8); c = torch.tensor([0, 4]); x = torch.randn(1, 2, 3); "
    "print(ctxfast.explain('attention', q, c, 4).used, "
    "ctxfast.explain('lstm', x, torch.randn(8, 3), torch.randn(8, 2)).used)"
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("", "cpu cpu", marks=pytest.mark.slow),
        pytest.param("reference", "reference reference", marks=pytest.mark.slow),
        ("attention=reference", "reference cpu"),
        ("reference,lstm=cpu", "reference cpu"),
    ],
)
def test_environment(value, expected) -> None:
    done = _in_new_process(_EXPLAIN, CTXFAST_IMPL=value)
    assert done.stdout.split() == expected.split(), done.stderr


def test_environment_that_cannot_be_read() -> None:
    code = "import sys; from ctxfast import cli; sys.exit(cli.main(['info']))"
    done = _in_new_process(code, CTXFAST_IMPL="lstm=quick")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "CTXFAST_IMPL='lstm=quick' cannot be read. ctxfast.lstm: impl is 'quick'; expected one of" in done.stderr


def test_show_config_names_everything() -> None:
    text = ctxfast.show_config()
    for word in ("ctxfast", "torch", torch.__version__, "triton", "gpu", "extension", "cpu kernels", "cuda kernels"):
        assert word in text
    for spec in registry.OPS.values():
        assert any(
            line.split() == [spec.name, *", ".join(map(str, spec.all_impls)).split()] for line in text.splitlines()
        )
    assert capability.extension() is not None


def test_what_an_implementation_has_run_on_is_said() -> None:
    proven = {None: "a (None)", "emulator": "a (emulator)", "H200 2026-12-02": "a (H200 2026-12-02)"}
    for value, shown in proven.items():
        assert str(registry.Impl("a", "cuda", "note", value)) == shown
    assert str(registry.Impl("a", "cpu", "note", "cpu")) == "a"
    spec = registry.OPS["lstm"]
    args = spec.arguments(**spec.cases()[0].make("cpu", torch.float32, 0))
    assert spec.note(spec.impl("cuda"), args).endswith("; run on the emulator alone, on no GPU")
    assert spec.note(spec.impl("cpu"), args) == spec.impl("cpu").note


def test_a_call_like_one_before_is_still_checked() -> None:
    """Without gradients a call like one before is not resolved again; what differs in kind alone is not like it."""
    qkv, offsets = torch.randn(1, 3, 2, 8), torch.tensor([0, 1], dtype=torch.int32)
    with torch.no_grad():
        ctxfast.attention(qkv, offsets, 1)
        with pytest.raises(TypeError, match="max_seqlen is a float; expected an int"):
            ctxfast.attention(qkv, offsets, 1.0)
        with ctxfast.use_impl(attention="triton"), pytest.raises(RuntimeError, match="impl='triton' was asked for"):
            ctxfast.attention(qkv.double(), offsets, 1)
        with ctxfast.use_impl(attention="reference"):
            assert ctxfast.explain("attention", qkv, offsets, 1).used == "reference"
            one = ctxfast.attention(qkv, offsets, 1)
        torch.testing.assert_close(ctxfast.attention(qkv, offsets, 1), one)


# Whose choice it is


def _in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_a_choice_belongs_to_its_thread(qkv) -> None:
    """Threads inside blocks of their own at the same time, and one inside none."""
    turn = threading.Barrier(3)

    def use(impl: str | None) -> tuple[str, str]:
        with ctxfast.use_impl(attention=impl) if impl else contextlib.nullcontext():
            turn.wait(30)  # all are inside
            found = _used(qkv)
            turn.wait(30)
        turn.wait(30)  # all are outside
        return found, _used(qkv)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(use, ("reference", "cpu", None)))
    assert found == [("reference", "cpu"), ("cpu", "cpu"), ("cpu", "cpu")]


def test_new_threads_begin_without_a_choice_and_copies_of_a_context_with_its_own(qkv) -> None:
    with ctxfast.use_impl("reference"):
        assert _in_thread(_used, qkv) == "cpu"
        assert _in_thread(contextvars.copy_context().run, _used, qkv) == "reference"
        assert asyncio.run(asyncio.to_thread(_used, qkv)) == "reference"
        assert _used(qkv) == "reference"


def test_a_choice_belongs_to_its_task(qkv) -> None:
    async def chooses() -> str:
        with ctxfast.use_impl("reference"):
            await asyncio.sleep(0)  # the other task runs
            return _used(qkv)

    async def does_not() -> str:
        return _used(qkv)

    async def both() -> list[str]:
        return await asyncio.gather(chooses(), does_not())

    assert asyncio.run(both()) == ["reference", "cpu"]


def test_the_environments_choice_is_every_threads() -> None:
    code = (
        f"from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(1).submit(exec, {_EXPLAIN!r}).result()"
    )
    done = _in_new_process(code, CTXFAST_IMPL="attention=reference")
    assert done.stdout.split() == ["reference", "cpu"], done.stderr


def test_a_backward_pass_keeps_what_its_forward_chose(monkeypatch) -> None:
    """Gradient checkpoints run layers once more: outside the block, and on a GPU in another thread."""
    config = ctxfast.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = ctxfast.Bert(config).train()
    model.gradient_checkpointing_enable()
    ran, spec = [], registry.OPS["attention"]
    resolve = calls.resolve
    monkeypatch.setattr(calls, "resolve", lambda of, *rest: _noted(ran, of, spec, resolve(of, *rest)))
    ids = torch.ones(2, 4, dtype=torch.int64)
    with ctxfast.use_impl(attention="reference"):
        loss = model(ids).last_hidden_state.sum()
    _in_thread(loss.backward)
    assert ran == ["reference", "reference"]
    ran.clear()
    loss = model(ids).last_hidden_state.sum()
    with ctxfast.use_impl(attention="reference"):
        loss.backward()
    assert ran == ["cpu", "cpu"]


def _noted(ran: list[str], of: registry.OpSpec, spec: registry.OpSpec, chosen: registry.Impl) -> registry.Impl:
    if of is spec:
        ran.append(chosen.name)
    return chosen


def test_compiled_functions_are_guarded_by_the_choice(qkv) -> None:
    """In one graph, around the call and inside of it, in every thread and task."""
    kernels: list[list[bool]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        kernels.append([any("attention_cpu_fwd" in name for name in names), any("arange" in name for name in names)])
        return graph

    compiled = torch.compile(ctxfast.attention, fullgraph=True, backend=backend)
    eager = ctxfast.attention(*qkv)

    def call() -> int:
        """Graphs made by a call."""
        before = len(kernels)
        torch.testing.assert_close(compiled(*qkv), eager)
        return len(kernels) - before

    async def task() -> int:
        with ctxfast.use_impl("reference"):
            await asyncio.sleep(0)
            return call()

    async def both() -> list[int]:
        return await asyncio.gather(task(), asyncio.to_thread(call))

    assert call() == 1 and kernels == [[True, False]]
    with ctxfast.use_impl("reference"):
        assert call() == 1 and kernels[-1] == [False, True]
        assert _in_thread(call) == 0  # the thread's is the first graph
        with ctxfast.use_impl(attention="cpu"):
            assert call() == 1 and kernels[-1] == [True, False]
    assert call() == 0
    assert asyncio.run(both()) == [0, 0]

    def inside(*args) -> torch.Tensor:
        with ctxfast.use_impl(attention="reference"):
            one = ctxfast.attention(*args)
        return one + ctxfast.attention(*args)

    compiled = torch.compile(inside, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*qkv), 2 * eager)
    assert kernels[-1] == [True, True]
    assert choice.requested() == ()
    with ctxfast.use_impl("reference"):
        torch.testing.assert_close(compiled(*qkv), 2 * eager)
        assert kernels[-1] == [False, True] and choice.requested() == (("*", "reference"),)


def test_an_unknown_autocast_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ctxfast.misspelt: autocast is 'fp32'; expected 'lower', 'keep' or a "):

        @calls.op(reference=len, check=lambda args: None, autocast="fp32")
        def misspelt() -> None: ...

    assert "misspelt" not in registry.OPS
