# SPDX-License-Identifier: Apache-2.0
"""What is to be reached on an H200, as data, and what was predicted before it was measured.

A ratio is a peer's time over ours in the same run. ``predictions.json`` has a row for each target, under its name:
a range in the target's unit and the reasoning. Pages print it beside what was measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import ResultRow

PREDICTIONS = Path(__file__).with_name("predictions.json")
GRAPH = ", CUDA graph"


@dataclass(frozen=True)
class Versus:
    """The fastest of these peers (names, or beginnings of names that end in a star) against us, as ratios."""

    peers: tuple[str, ...]
    must: float
    aim: float

    def holds(self, provider: str) -> bool:
        return any(provider.startswith(p[:-1]) if p.endswith("*") else provider == p for p in self.peers)


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Args:
        name: in pages and in ``predictions.json``.
        group: rows that are measured in one process.
        case: op/workload/dtype/pass of the suite.
        versus: whom we are compared with.
        ours: the provider meant; empty for what ctxfast runs by itself.
        us_per_step: (must, aim) in microseconds a step, where the target is absolute; the unit is then a step.
        memory: the peer's memory over ours that must be reached, 0 for no such target.
        graphs: everybody also in a CUDA graph, and compared there: the host takes longer than the device.
        is_compiled: torch.compile is among the peers, which takes long to warm up.
    """

    name: str
    group: str
    case: str
    versus: tuple[Versus, ...]
    ours: str = ""
    us_per_step: tuple[float, float] | None = None
    memory: float = 0.0
    graphs: bool = False
    is_compiled: bool = False

    def is_of(self, row: ResultRow) -> bool:
        """Whether a result belongs to it; in a dry run, on a CPU, whatever the dtype."""
        op, workload, dtype, pass_name = self.case.split("/")
        same = (row.op, row.workload, row.pass_name) == (op, workload, pass_name)
        return same and (row.device == "cpu" or row.dtype == dtype)


_NN, _LOOP, _FLIP = "nn.LSTM", "Python loop (AllenNLP style)", "two nn.LSTM and flip"
_EAGER, _SORTED = "Hugging Face, eager", "Hugging Face, eager, sorted by length"
# Not max-autotune, which compiles for minutes and was never the fastest.
_REDUCED = "Hugging Face, torch.compile reduce-overhead"
_HUGGING_FACE = (_EAGER, "Hugging Face, torch.compile", _REDUCED)


def _elmo(B: int, pass_name: str, versus: Sequence[Versus], **more: Any) -> Target:
    ours = more.get("ours", "")
    by = f" by {ours.removeprefix('ctxfast ')}" if ours else ""
    name = f"ELMo layer, {B} row{'s' * (B > 1)}{by}{', forward+backward' * (pass_name != 'forward')}"
    case = f"lstm/elmo-original both directions B{B} T128/float16/{pass_name}"
    return Target(name, "lstm", case, tuple(versus), **more)


def _plain(H: int, B: int, packed: bool) -> Target:
    versus = [Versus((_NN,), 8, 12)]
    if not packed:  # flipped whole, rows of different lengths would be wrong
        versus.append(Versus((_FLIP,), 1.2, 1.8))
    case = f"lstm/biLSTM H{H} B{B} T128{' packed' * packed}/float16/forward"
    # Packed sequences are the modules': both pack and unpack.
    ours = "ctxfast nn.LSTM" * packed
    return Target(f"biLSTM {H}, {B} rows{', packed' * packed}", "lstm", case, tuple(versus), ours=ours)


def _bert(name: str, workload: str, versus: Versus, group: str = "bert", **more: Any) -> Target:
    op = "bert_mlm" if group == "training" else "bert"
    return Target(name, group, f"{op}/{workload}/bfloat16/forward", (versus,), **more)


def _attention(name: str, workload: str, versus: Versus, pass_name: str = "forward") -> Target:
    return Target(name, "rows", f"attention/{workload}/bfloat16/{pass_name}", (versus,), graphs=True)


_MASKED = ("torch varlen_attn", "SDPA padded, key mask*")
_FULL = ("SDPA padded, no mask*",)
_FLASH = ("SDPA padded, no mask, flash",)

TARGETS = (
    *(
        _elmo(B, "forward", [Versus((_NN,), 12, 16), Versus((_LOOP,), 75, 110)], us_per_step=(4.3, 3.0))
        for B in (1, 8)
    ),
    _elmo(32, "forward", [Versus((_NN,), 6.5, 9)], us_per_step=(7.4, 5.3)),
    _elmo(128, "forward", [Versus((_NN,), 3, 4)]),
    *(
        _elmo(B, "forward", [Versus((_NN,), 3, 4)], ours="ctxfast cuda_step", us_per_step=(16.0, 12.0))
        for B in (8, 32)
    ),
    _elmo(32, "forward+backward", [Versus((_NN,), 4, 7), Versus((_LOOP,), 40, 70)]),
    *(_plain(H, B, packed) for H in (512, 1024) for B in (8, 32) for packed in (False, True)),
    Target(
        "ELMo, 32 texts of 128 tokens", "elmo", "elmo/original 32x128 words/float16/forward",
        (Versus(("plain PyTorch, Python loop",), 30, 60),),
    ),
    _attention("attention, 256 ragged texts, heads of 64", "bert-base ragged 256", Versus(_MASKED, 2, 3)),
    _attention("attention, 1024 ragged texts, heads of 32", "minilm ragged 1024", Versus(_MASKED, 2, 3)),
    _attention("attention, 32 x 512", "bert-base 32x512", Versus(_FULL, 1.0, 1.2)),
    _attention("attention, 64 x 128", "bert-base 64x128", Versus(_FULL, 1.0, 1.2)),
    _attention(
        "attention, 32 x 512, dropout, forward+backward", "bert-base 32x512 dropout", Versus(_FLASH, 1.2, 1.6),
        "forward+backward",
    ),
    _attention(
        "attention, 64 x 128, dropout, forward+backward", "bert-base 64x128 dropout", Versus(_FLASH, 1.2, 1.6),
        "forward+backward",
    ),
    Target(
        "add_layer_norm, 16384 rows", "rows", "add_layer_norm/bert-base 16384 rows/bfloat16/forward",
        (Versus(("torch.compile of the reference",), 1.0, 1.2),), graphs=True, is_compiled=True,
    ),
    Target(
        "add_layer_norm, 16384 rows, forward+backward", "rows",
        "add_layer_norm/bert-base 16384 rows/bfloat16/forward+backward",
        (Versus(("F.layer_norm after adds",), 2.0, 3.0),), graphs=True,
    ),
    _bert("BERT-Base, 1 x 128", "bert-base 1x128", Versus((_REDUCED,), 1.6, 2.5), is_compiled=True),
    _bert("BERT-Base, 256 ragged texts", "bert-base ragged 256 (fill 0.15)", Versus((_EAGER, _SORTED), 10, 13)),
    _bert("BERT-Base, 64 x 128", "bert-base 64x128", Versus(_HUGGING_FACE, 1.3, 1.5), is_compiled=True),
    _bert("BERT-Base, 32 x 512", "bert-base 32x512", Versus(_HUGGING_FACE, 1.3, 1.5), is_compiled=True),
    _bert(
        "masked-LM step, 32 x 512", "bert-base step 32x512", Versus(_HUGGING_FACE, 1.7, 2.5), "training",
        is_compiled=True,
    ),
    _bert(
        "masked-LM step, 32 x 128", "bert-base step 32x128", Versus(_HUGGING_FACE, 1.7, 2.5), "training",
        is_compiled=True,
    ),
    _bert(
        "masked-LM step, 256 ragged texts", "bert-base step ragged 256", Versus(_HUGGING_FACE, 3.5, 5),
        "training", memory=2.0, is_compiled=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """Written before the first run: between ``low`` and ``high``, in milliseconds or microseconds a step."""

    low: float
    high: float
    unit: str
    why: str

    @property
    def words(self) -> str:
        span = f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        return f"{span} {self.unit}"


@functools.lru_cache(maxsize=1)
def predictions() -> dict[str, Prediction]:
    """By the name of a target."""
    document = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    return {name: Prediction(**row) for name, row in document["rows"].items()}


@dataclass(frozen=True)
class Finding:
    """A target beside what was measured: ours, and for each ``Versus`` the fastest peer, None where there is none."""

    target: Target
    ours: ResultRow | None
    peers: tuple[ResultRow | None, ...]

    @property
    def value(self) -> float | None:
        """In the prediction's unit."""
        if self.ours is None:
            return None
        unit = predictions()[self.target.name].unit
        return self.ours.us_per_step if unit == "us a step" else self.ours.median_ms

    def ratio(self, place: int) -> float | None:
        peer = self.peers[place]
        if self.ours is None or peer is None or not self.ours.median_ms or not peer.median_ms:
            return None
        return peer.median_ms / self.ours.median_ms

    def verdicts(self) -> list[str]:
        """A sentence for each thing the target asks for."""
        found = []
        if self.target.us_per_step and self.ours is not None and self.ours.us_per_step is not None:
            must, aim = self.target.us_per_step
            found.append(f"{_verdict(must / self.ours.us_per_step, 1, must / aim)} ({must:g} us)")
        for place, versus in enumerate(self.target.versus):
            ratio, peer = self.ratio(place), self.peers[place]
            if ratio is not None and peer is not None:
                verdict = _verdict(ratio, versus.must, versus.aim)
                found.append(f"{ratio:.2f}x of {versus.must:g}x over {peer.provider}: {verdict}")
            else:
                found.append(f"not compared with {' or '.join(versus.peers)}")
        peer = self.peers[0]
        if self.target.memory and self.ours is not None and peer is not None and self.ours.memory_mib:
            ratio = (peer.memory_mib or 0.0) / self.ours.memory_mib
            found.append(f"memory {ratio:.2f}x of {self.target.memory:g}x: {_verdict(ratio, self.target.memory)}")
        return found


def _verdict(ratio: float, must: float, aim: float | None = None) -> str:
    if aim is not None and ratio >= aim:
        return "aim met"
    return "must met" if ratio >= must else "missed"


def find(target: Target, rows: Iterable[ResultRow]) -> Finding:
    """A target in the rows of a result file. Where it is compared in CUDA graphs, those of a graph come first."""
    timed = [row for row in rows if target.is_of(row) and row.median_ms is not None]
    graphs = [row for row in timed if row.provider.endswith(GRAPH)] if target.graphs else []
    plain = [row for row in timed if not row.provider.endswith(GRAPH)]
    name = target.ours or next((row.provider for row in plain if row.chosen), None)
    ours = next((row for row in (*graphs, *plain) if row.provider.removesuffix(GRAPH) == name), None)
    in_graph = ours is not None and ours in graphs
    peers = []
    for versus in target.versus:
        held = [row for row in (graphs if in_graph else plain) if versus.holds(row.provider.removesuffix(GRAPH))]
        held = held or [row for row in plain if versus.holds(row.provider)]
        peers.append(min(held, key=lambda row: row.median_ms, default=None))
    return Finding(target, ours, tuple(peers))


def page(rows: Sequence[ResultRow], *, only_measured: bool = False) -> str:
    """Measured beside predicted, as Markdown; "" if no target was measured."""
    findings = [find(target, rows) for target in TARGETS]
    if only_measured:
        findings = [finding for finding in findings if finding.ours is not None]
    if not any(finding.ours is not None for finding in findings):
        return ""
    lines = ["| target | measured | predicted | measured / predicted | verdict |", "|---|---:|---:|---:|---|"]
    for finding in findings:
        prediction, value = predictions()[finding.target.name], finding.value
        measured, share = "-", "-"
        if value is not None:
            measured = f"{value:.4g} {prediction.unit}"
            middle = (prediction.low * prediction.high) ** 0.5
            share = f"{value / middle:.2f}"
        words = "; ".join(finding.verdicts()) if finding.ours is not None else "not measured"
        lines.append(f"| {finding.target.name} | {measured} | {prediction.words} | {share} | {words} |")
    return "\n".join(lines) + "\n"
