# SPDX-License-Identifier: Apache-2.0
"""Direct calls into the compiled extension, against a plain loop in float64.

Parity of the ops through their public functions is tested elsewhere; here arrays are numpy's, and every
instruction set and several thread counts are tried.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import ctxfast
from ctxfast import _C
from ctxfast.ops.shared.definitions import rounded_rows

ISAS = ("generic", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx")
RUNNABLE = _C.cpu_isas()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def _pack(weight_hh: np.ndarray, weight_proj: np.ndarray | None, dtype: str) -> np.ndarray:
    shape = (weight_hh.shape[0] // 4, weight_hh.shape[1], weight_proj is not None, dtype)
    packed = np.empty(_C.lstm_packed_bytes(*shape), np.uint8)
    weights = (each for weight in (weight_hh, weight_proj) for each in (_address(weight), _strides(weight)))
    _C.lstm_pack(*shape, *weights, _address(packed))
    return packed


def _pack_input(weight_ih: np.ndarray, dtype: str) -> np.ndarray:
    shape = (weight_ih.shape[0] // 4, weight_ih.shape[1], dtype)
    packed = np.empty(_C.lstm_input_packed_bytes(*shape), np.uint8)
    _C.lstm_pack_input(*shape, _address(weight_ih), _strides(weight_ih), _address(packed))
    return packed


def _strides(array: np.ndarray | None) -> tuple[int, ...]:
    return () if array is None else tuple(stride // array.itemsize for stride in array.strides)


@dataclass
class Problem:
    """Random arguments of one call, for the kernel and a float64 loop; proj_size None: no projection."""

    batch: int
    steps: int
    hidden: int
    proj_size: int | None
    directions: int
    clips: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.size = self.hidden if self.proj_size is None else self.proj_size

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return (scale * rng.standard_normal(shape)).astype(np.float32)

        both = range(self.directions)
        gate_count = 4 * self.hidden
        self.input = int(rng.integers(1, 80))
        self.x = [normal(self.batch, self.steps, self.input) for _ in both]
        self.weight_ih = [normal(gate_count, self.input, scale=2 * self.input**-0.5) for _ in both]
        self.bias = [normal(gate_count) for _ in both]
        self.weight_hh = [normal(gate_count, self.size, scale=(self.size + 1) ** -0.5) for _ in both]
        self.weight_proj = None
        if self.proj_size is not None:
            self.weight_proj = [normal(self.size, self.hidden, scale=2 * (self.hidden + 1) ** -0.5) for _ in both]
        self.h_0 = normal(self.directions, self.batch, self.size)
        self.c_0 = normal(self.directions, self.batch, self.hidden)
        self.lengths = rng.integers(0, self.steps + 1, self.batch)

    def run(
        self,
        threads: int = 1,
        isa: str = "auto",
        dtype: str = "float32",
        rows: list[int] | None = None,
        **changes,
    ) -> dict[str, np.ndarray]:
        """The kernel's results for these rows of the batch (None: all); outputs begin as NaN."""
        pick = list(range(self.batch)) if rows is None else rows
        count, projected, both = len(pick), self.weight_proj is not None, range(self.directions)
        x = [np.ascontiguousarray(each[pick]) for each in self.x]
        h_0, c_0 = np.ascontiguousarray(self.h_0[:, pick]), np.ascontiguousarray(self.c_0[:, pick])
        lengths = self.lengths[pick].astype(np.int64)
        packed = [_pack(self.weight_hh[r], self.weight_proj[r] if projected else None, dtype) for r in both]
        packed_input = [_pack_input(weight, dtype) for weight in self.weight_ih]
        width = self.directions * self.size
        out = {
            "output": np.full((count, self.steps, width), np.nan, np.float32),
            "h_n": np.full((self.directions, count, self.size), np.nan, np.float32),
            "c_n": np.full((self.directions, count, self.hidden), np.nan, np.float32),
            "cells": np.full((self.directions, count, self.steps, self.hidden), np.nan, np.float32),
        }
        arguments = dict(
            batch=count,
            steps=self.steps,
            directions=self.directions,
            hidden=self.hidden,
            proj_size=self.size,
            has_projection=projected,
            weight_dtype=dtype,
            input=self.input,
            x=[_address(each) for each in x],
            x_strides=[(self.steps * self.input, self.input)] * self.directions,
            packed_input=[_address(buffer) for buffer in packed_input],
            bias=[_address(bias) for bias in self.bias],
            packed=[_address(buffer) for buffer in packed],
            lengths=_address(lengths),
            h_0=_address(h_0),
            c_0=_address(c_0),
            output=_address(out["output"]),
            output_strides=(self.steps * width, width),
            h_n=_address(out["h_n"]),
            c_n=_address(out["c_n"]),
            cells=_address(out["cells"]),
            cell_clip=self.clips[0],
            proj_clip=self.clips[1],
            threads=threads,
            isa=isa,
        )
        _C.lstm_forward(**{**arguments, **changes})
        return out

    def expected(self, dtype: str) -> dict[str, np.ndarray]:
        """The same in float64, row by row and step by step."""

        def held(value: np.ndarray) -> np.ndarray:
            rounding = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}[dtype]
            return rounded_rows(torch.from_numpy(value).float(), rounding).double().numpy()

        def clip(value: np.ndarray, bound: float) -> np.ndarray:
            return np.clip(value, -bound, bound) if bound else value

        output = np.zeros((self.batch, self.steps, self.directions * self.size))
        cells = np.zeros((self.directions, self.batch, self.steps, self.hidden))
        h_n, c_n = self.h_0.astype(np.float64), self.c_0.astype(np.float64)
        for r in range(self.directions):
            x, ih, hh = held(self.x[r]), held(self.weight_ih[r]), held(self.weight_hh[r])
            proj = None if self.weight_proj is None else held(self.weight_proj[r])
            for b in range(self.batch):
                h, c = h_n[r, b], c_n[r, b]
                times = range(self.lengths[b])
                for t in times if r == 0 else reversed(times):
                    i, f, g, o = np.split(ih @ x[b, t] + self.bias[r] + hh @ held(h), 4)
                    c = clip(_sigmoid(i) * np.tanh(g) + _sigmoid(f) * c, self.clips[0])
                    m = _sigmoid(o) * np.tanh(c)
                    h = clip(m if proj is None else proj @ held(m), self.clips[1])
                    output[b, t, r * self.size : (r + 1) * self.size] = h
                    cells[r, b, t] = c
                h_n[r, b], c_n[r, b] = h, c
        return {"output": output, "h_n": h_n, "c_n": c_n, "cells": cells}


PROBLEMS = [
    Problem(1, 3, 16, None, 1),
    Problem(5, 7, 33, None, 2, seed=1),
    Problem(4, 3, 200, None, 1, clips=(1.0, 0.3), seed=2),
    Problem(3, 4, 40, 7, 2, seed=3),
    Problem(9, 3, 300, 70, 2, clips=(1.0, 0.3), seed=4),
    Problem(2, 2, 5, 129, 1, seed=5),
    Problem(7, 2, 530, 65, 1, seed=6),
    Problem(13, 5, 1, 1, 2, seed=7),
    Problem(0, 3, 4, None, 1),
    Problem(3, 0, 4, 3, 2),
    Problem(2, 3, 0, 5, 1),
    Problem(2, 3, 5, 0, 1),
]


def _name(problem: Problem) -> str:
    clips = "-clips" if any(problem.clips) else ""
    sizes = f"B{problem.batch}-T{problem.steps}-H{problem.hidden}-P{problem.proj_size}"
    return f"{sizes}-R{problem.directions}{clips}"


# Of rounded factors: h near the middle of two steps may go either way, one step in a sum.
NEAR = {"float32": 2e-6, "bfloat16": 4e-3, "int8": 2e-2}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("problem", PROBLEMS, ids=_name)
def test_lstm_against_float64(problem: Problem, dtype: str) -> None:
    expected = problem.expected(dtype)
    for isa in RUNNABLE:
        for threads in (1, 2, 7):
            for name, value in problem.run(threads, isa, dtype).items():
                what = f"{name} {isa} {threads}"
                np.testing.assert_allclose(value, expected[name], rtol=0, atol=NEAR[dtype], err_msg=what)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("proj_size", [None, 72])
def test_lstm_bits_depend_on_neither_threads_nor_batch(proj_size: int | None, isa: str, dtype: str) -> None:
    problem = Problem(13, 4, 290, proj_size, 2, seed=8)
    whole = problem.run(1, isa, dtype)
    for threads in (2, 3, 8):
        for name, value in problem.run(threads, isa, dtype).items():
            np.testing.assert_array_equal(value, whole[name], err_msg=f"{name} {threads}")
    for rows in ([4], [12, 0], [3, 5, 7], [9, 8, 2, 1, 0], list(range(11, -1, -1))):
        part = problem.run(2, isa, dtype, rows=rows)
        np.testing.assert_array_equal(part["output"], whole["output"][rows])
        for name in ("h_n", "c_n", "cells"):
            np.testing.assert_array_equal(part[name], whole[name][:, rows], err_msg=f"{name} {rows}")


@pytest.mark.parametrize("isa", RUNNABLE)
def test_lstm_gate_functions_are_exact_to_float32(isa: str) -> None:
    """Without recurrence c = sigmoid(i) tanh(g), its relative error near float32's own."""
    x = np.concatenate([np.linspace(-30, 30, 4001), np.geomspace(1e-30, 1, 300), -np.geomspace(1e-30, 1, 300)])
    x = x.astype(np.float32)
    problem = Problem(1, 1, x.size, 0, 1)
    problem.lengths[:] = 1
    problem.c_0[:] = 0
    for i, g in ((x, x[::-1]), (x[::-1], x), (np.full_like(x, 0.5), x)):
        problem.x[0][:] = 0
        problem.bias[0] = np.concatenate([i, x, g, x])
        c = problem.run(isa=isa)["c_n"][0, 0]
        exact = np.tanh(g.astype(np.float64)) / (1 + np.exp(-i.astype(np.float64)))
        np.testing.assert_allclose(c, exact, rtol=4e-7, atol=1e-37)


@pytest.mark.parametrize("isa", RUNNABLE)
def test_lstm_saturates_and_lets_nan_through(isa: str) -> None:
    problem = Problem(1, 1, 5, None, 1, clips=(3.0, 3.0))
    problem.lengths[:] = 1
    problem.weight_hh[0][:] = 0
    big, inf, nan = 1e30, np.inf, np.nan
    i, f = [big, -inf, inf, -big, nan], [-big, inf, -inf, -big, 0]
    g, o = [inf, big, -inf, big, 1], [inf, inf, big, -inf, 1]
    problem.x[0][:] = 0
    problem.bias[0] = np.array([i, f, g, o], np.float32).ravel()
    problem.c_0[0, 0] = [1, 0.5, 1, 1, 1]
    out = problem.run(isa=isa)
    np.testing.assert_allclose(out["c_n"][0, 0], [1, 0.5, -1, 0, nan], atol=1e-7)
    np.testing.assert_allclose(out["h_n"][0, 0], [np.tanh(1), np.tanh(0.5), -np.tanh(1), 0, nan], atol=1e-6)


def test_lstm_errs_as_little_as_torch() -> None:
    problem = Problem(6, 24, 256, 64, 1, seed=9)
    problem.lengths[:] = problem.steps
    layer = torch.nn.LSTM(problem.input, 256, proj_size=64, batch_first=True).requires_grad_(False)
    layer.weight_ih_l0.copy_(torch.from_numpy(problem.weight_ih[0]))
    layer.bias_ih_l0.copy_(torch.from_numpy(problem.bias[0]))
    layer.bias_hh_l0.zero_()
    layer.weight_hh_l0.copy_(torch.from_numpy(problem.weight_hh[0]))
    layer.weight_hr_l0.copy_(torch.from_numpy(problem.weight_proj[0]))
    state = torch.from_numpy(problem.h_0), torch.from_numpy(problem.c_0)
    theirs = layer(torch.from_numpy(problem.x[0]), state)[0].numpy()
    exact = problem.expected("float32")["output"]
    ours = problem.run()["output"]
    # Both are random walks of roundings: within the factor 2 that holds for every kernel, and
    # nearer on the average.
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max()
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= 1.5 * np.sqrt(np.mean((theirs - exact) ** 2))


def test_lstm_strides_and_absent_arguments() -> None:
    problem = Problem(3, 4, 20, 6, 2, seed=10)
    problem.lengths[:] = problem.steps
    problem.h_0[:], problem.c_0[:] = 0, 0
    plain = problem.run()
    # Time-major x and output with gaps, no lengths, no initial state, cells not wanted.
    width = problem.input + 10
    x = [np.full((4, 5, width), np.nan, np.float32) for _ in range(2)]
    for r in range(2):
        x[r][:, :3, : problem.input] = problem.x[r].transpose(1, 0, 2)
    output = np.full((4, 7, 16), 7.0, np.float32)
    other = problem.run(
        x=[_address(each) for each in x],
        x_strides=[(width, 5 * width)] * 2,
        output=_address(output),
        output_strides=(16, 112),
        lengths=0,
        h_0=0,
        c_0=0,
        cells=0,
    )
    np.testing.assert_array_equal(output[:, :3, :12].transpose(1, 0, 2), plain["output"])
    assert (output[:, 3:] == 7).all() and (output[:, :, 12:] == 7).all()
    np.testing.assert_array_equal(other["c_n"], plain["c_n"])
    assert np.isnan(other["cells"]).all()


def test_lstm_pack_takes_strides_and_rounds_to_nearest_even() -> None:
    hidden, size = 18, 5
    rng = np.random.default_rng(0)
    weight_hh = rng.standard_normal((4 * hidden, size)).astype(np.float32)
    weight_proj = rng.standard_normal((size, hidden)).astype(np.float32)
    for dtype in ("float32", "bfloat16"):
        a = _pack(weight_hh, weight_proj, dtype)
        b = _pack(np.asfortranarray(weight_hh), np.asfortranarray(weight_proj), dtype)
        np.testing.assert_array_equal(a, b)
    bits = np.unique(a.view(np.uint16))
    rounded = torch.from_numpy(np.concatenate([weight_hh.ravel(), weight_proj.ravel()])).bfloat16()
    np.testing.assert_array_equal(bits[bits != 0], np.unique(rounded.view(torch.int16).numpy().view(np.uint16)))


def test_lstm_pack_takes_null_for_what_is_empty_only() -> None:
    _C.lstm_pack(0, 5, True, "float32", 0, (5, 1), 0, (0, 1), 0)  # no cells: torch gives an empty tensor the address 0
    with pytest.raises(ValueError, match="weight_proj is null; expected an address"):
        _C.lstm_pack(8, 5, True, "float32", 4, (5, 1), 0, (8, 1), 4)
    with pytest.raises(ValueError, match="weight_hh is null; expected an address"):
        _C.lstm_pack(8, 8, False, "float32", 0, (8, 1), 0, (), 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": -1}, "batch is -1; expected 0 or more"),
        ({"steps": -2}, "steps is -2; expected 0 or more"),
        ({"hidden": -1}, "hidden is -1; expected 0 or more"),
        ({"has_projection": False}, "proj_size is 3; expected hidden = 8, as there is no projection"),
        ({"weight_dtype": "float16"}, "weight_dtype is float16; expected one of float32, bfloat16, int8"),
        ({"input": -1}, "input is -1; expected 0 or more"),
        ({"x": [0]}, "x is null; expected an address"),
        ({"x": []}, "x is null"),
        ({"packed_input": [0]}, "packed_input is null"),
        ({"packed": [0]}, "packed is null"),
        ({"packed": [2]}, "packed is misaligned; expected a multiple of 4"),
        ({"directions": 3}, "directions is 3; expected 1..2"),
        ({"output": 0}, "output is null; expected an address"),
        ({"h_n": 0}, "h_n is null"),
        ({"c_n": 0}, "c_n is null"),
        ({"threads": 0}, "threads is 0; expected 1 or more"),
        ({"cell_clip": -1.0}, "cell_clip is -1.000000; expected above 0, or 0 for none"),
        ({"proj_clip": float("nan")}, "proj_clip is nan"),
    ],
)
def test_lstm_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Problem(2, 3, 8, 3, 1).run(**changes)
    assert str(error.value).startswith("ctxfast.lstm: ")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"isa": "sse9"}, ValueError, "isa is 'sse9'; expected 'auto', 'generic'"),
        ({"weight_dtype": "half"}, ValueError, "weight_dtype is 'half'; expected one of 'float32', 'float16'"),
        ({"packed": [4, 4, 4]}, ValueError, "packed is [4, 4, 4]; expected at most 2 entries"),
        ({"batch": "2"}, TypeError, "batch is '2'; expected an integer of 64 bits"),
        ({"batch": 2**63}, TypeError, "batch is 9223372036854775808; expected an integer of 64 bits"),
        ({"has_projection": 1}, TypeError, "has_projection is 1; expected a bool"),
        ({"cell_clip": "off"}, TypeError, "cell_clip is 'off'; expected a number"),
        ({"output": -1}, TypeError, "output is -1; expected an address"),
        ({"h_0": None}, TypeError, "h_0 is None; expected an address"),
        ({"isa": 1}, TypeError, "isa is 1; expected a string"),
        ({"x": 4}, TypeError, "x is 4; expected a sequence"),
        ({"gates": [4]}, TypeError, "has no argument gates"),
    ],
)
def test_what_does_not_fit_the_table(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^ctxfast._C.lstm_forward:? {re.escape(message)}"):
        Problem(2, 3, 8, 3, 1).run(**changes)


def test_arguments_by_position_and_by_name() -> None:
    shape = dict(hidden=8, proj_size=5, has_projection=True, weight_dtype="float32")
    wanted = _C.lstm_packed_bytes(**shape)
    assert (
        wanted
        == _C.lstm_packed_bytes(*shape.values())
        == _C.lstm_packed_bytes(8, 5, weight_dtype="float32", has_projection=True)
    )
    for given, named, message in (
        ((8, 5, True), {}, "lacks weight_dtype"),
        ((), {}, "lacks hidden, proj_size, has_projection, weight_dtype"),
        ((8, 5), {"hidden": 8, "has_projection": True}, "got hidden twice"),
        ((8, 5, True, "float32", 1), {}, "takes at most 4 arguments, not 5"),
        ((8, 5, True), {"dtype": "float32"}, "has no argument dtype"),
    ):
        with pytest.raises(TypeError, match=f"^ctxfast._C.lstm_packed_bytes {message}$"):
            _C.lstm_packed_bytes(*given, **named)


def test_lstm_bad_lengths() -> None:
    problem = Problem(2, 3, 8, 3, 1)
    for length in (4, -1):
        problem.lengths[1] = length
        with pytest.raises(ValueError, match=rf"lengths\[1\] is {length}; expected 0..3, the number of steps"):
            problem.run()


def test_scalar_mix_checks_before_it_launches() -> None:
    if not _C.build_info()["cuda"]:
        with pytest.raises(AttributeError, match="has no scalar_mix_forward: CUDA kernels were not compiled"):
            _C.scalar_mix_forward(1, 1, "float32", [1], 1, 1, 0)
        return
    with pytest.raises(ValueError, match="the number of inputs is 65; expected 1..64"):
        _C.scalar_mix_forward(65, 1, "float32", [1], 1, 1, 0)
    with pytest.raises(ValueError, match="expected at most 64 entries"):
        _C.scalar_mix_forward(64, 1, "float32", [1] * 65, 1, 1, 0)
    with pytest.raises(ValueError, match="an input is null"):
        _C.scalar_mix_forward(2, 1, "float32", [1], 1, 1, 0)
    with pytest.raises(ValueError, match="numel is -1; expected 0 or more"):
        _C.scalar_mix_forward(1, -1, "float32", [1], 1, 1, 0)
    with pytest.raises(ValueError, match="dtype is int8"):
        _C.scalar_mix_forward(1, 1, "int8", [1], 1, 1, 0)
    with pytest.raises(ValueError, match="workspace is 0 bytes; expected 8 bytes"):
        _C.scalar_mix_backward(2, 5, "float32", 16, [16, 16], 16, [], 16, 0, 0, 0)
    assert _C.scalar_mix_workspace_bytes(2, 0) == 0
    _C.scalar_mix_forward(1, 0, "float32", [0], 0, 0, 0)  # nothing to do is no error, GPU or not


def test_one_openmp_runtime() -> None:
    """In a process of its own: other tests' packages bring runtimes along."""
    code = (
        "import re, torch, ctxfast\n"
        "from pathlib import Path\n"
        "x = torch.randn(4, 2, 64)\n"
        "weights = [torch.randn(1024, 64), torch.randn(1024, 64), torch.randn(1024), torch.randn(64, 256)]\n"
        "torch.set_num_threads(2)\n"
        "ctxfast.lstm(x, *weights, impl='cpu')  # enough work for two threads\n"
        "maps = Path('/proc/self/maps').read_text()\n"
        "found = {Path(name).resolve() for name in re.findall(r'(/\\S*lib[gi]?omp[\\w.-]*\\.so\\S*)', maps)}\n"
        "assert len(found) == 1, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_threads_stay_free_to_run_on_every_core() -> None:
    """A thread that wakes up on its caller's core moves away, and may come back."""

    def masks() -> dict[int, set[int]]:
        return {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}

    qkv, offsets = torch.randn(256, 3, 4, 32), torch.tensor([0, 256], dtype=torch.int32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ctxfast.attention(qkv, offsets, 256, impl="cpu")  # starts the threads
        before = masks()
        for _ in range(10):
            time.sleep(0.03)  # so that they sleep
            ctxfast.attention(qkv, offsets, 256, impl="cpu")
            after = masks()
            assert {task: after[task] for task in before} == before
    finally:
        torch.set_num_threads(threads)
