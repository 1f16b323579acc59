# SPDX-License-Identifier: Apache-2.0
"""A page and a plot of a result file, and the comparison of two.

A ratio is a peer's time over ours: above 1, ctxfast is faster. "Ours" is what a call without ``impl=`` runs. Cases
that ctxfast loses stand in the same table and the same plot as those it wins.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import targets
from .measure import ResultRow
from .results import dtype_words, number, speed, write_bytes

# Below this a difference between two result files is taken for noise even where the spreads do not overlap.
_NOISE = 1.05


@dataclass(frozen=True)
class Summary:
    """One case of a result file: our row, who competes, who does not run.

    ``peers`` is sorted, fastest first; the reference is among them unless it is what ctxfast chose.
    """

    case: str
    ours: ResultRow | None
    peers: tuple[ResultRow, ...]
    absent: tuple[ResultRow, ...]
    siblings: tuple[ResultRow, ...]

    @property
    def title(self) -> str:
        return f"{self.first.op}: {self.first.workload}"

    @property
    def detail(self) -> str:
        return dtype_words(self.first.dtype) + (", forward+backward" if self.first.pass_name != "forward" else "")

    @property
    def first(self) -> ResultRow:
        return (*((self.ours,) if self.ours else ()), *self.peers, *self.absent, *self.siblings)[0]

    @property
    def best(self) -> ResultRow | None:
        """The fastest peer."""
        return self.peers[0] if self.peers else None

    def ratio(self, row: ResultRow) -> float | None:
        """That row's time over ours."""
        if self.ours is None or self.ours.median_ms is None or row.median_ms is None:
            return None
        return row.median_ms / self.ours.median_ms


def summarise(rows: Iterable[ResultRow]) -> list[Summary]:
    """Rows of a result file gathered by case, in their order."""
    by_case: dict[str, list[ResultRow]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    summaries = []
    for case, found in by_case.items():
        timed = sorted((row for row in found if row.median_ms is not None), key=lambda row: row.median_ms)
        summaries.append(
            Summary(
                case,
                next((row for row in timed if row.chosen), None),
                tuple(row for row in timed if not row.chosen and _is_peer(row)),
                tuple(row for row in found if row.median_ms is None),
                tuple(row for row in timed if not row.chosen and not _is_peer(row)),
            )
        )
    return summaries


def _is_peer(row: ResultRow) -> bool:
    return not row.ours or row.provider.startswith("ctxfast reference")


# the page


def markdown(document: dict[str, Any], plot: str | None = None) -> str:
    """The page of a result file; ``plot`` is the name of the picture beside it."""
    summaries = summarise(document["rows"])
    lines = [f"# Benchmarks: {document['machine']}, {document['date'][:10]}", ""]
    lines += _machine_lines(document)
    if plot:
        lines += ["", f"![ratio of the fastest peer's time to ctxfast's, by case]({plot})"]
    lines += ["", *_main_table(summaries), ""]
    if document["device"] == "cuda":
        predicted = targets.page(document["rows"], only_measured=True)
        lines += ["Measured beside predicted:", "", predicted] if predicted else []
    siblings = [(s, row) for s in summaries for row in s.siblings]
    if siblings:
        lines += ["Implementations of ctxfast that were not chosen:", ""]
        lines += [f"- {s.title} ({s.detail}): {row.provider}, {_times(s.ratio(row))}" for s, row in siblings] + [""]
    lines += _absent_lines(summaries)
    return "\n".join(lines).rstrip() + "\n"


def _machine_lines(document: dict[str, Any]) -> list[str]:
    facts, settings = document["facts"], document["settings"]
    dirty = " with changes that are not committed" if document["dirty"] else ""
    where = facts["gpu"] if document["device"] == "cuda" else facts["cpu"]
    sets = ", ".join(document["instruction_sets"])
    versions = f"torch {facts['torch']}, Python {facts['python']}"
    busy = settings.get("others_kept_busy")
    load = "load of others unknown" if busy is None else f"other programs kept {number(busy)} cores busy meanwhile"
    lines = [
        f"- {where}" + (f"; {sets}" if document["device"] == "cpu" and sets else ""),
        f"- commit {document['commit']}{dirty}; {versions}; `{document['command']}`",
        f"- {settings['threads']}; {load}; everybody passed parity before being timed; rounds in turn, medians",
    ]
    if taken_out := document.get("taken_out"):
        what = "1 case is" if taken_out == 1 else f"{taken_out} cases are"
        lines.append(f"- {what} left out here: measured again in later runs")
    if document["device"] == "cuda":
        lines.append("- CUDA events; ops with a flushed L2 cache, models warm")
    return lines


def _main_table(summaries: Sequence[Summary]) -> list[str]:
    lines = [
        "Ratio = peer's time / ctxfast's: above 1, ctxfast is faster; **bold** where a peer is faster.",
        "",
        "| case | dtype, pass | ctxfast runs | ms | rate | fastest peer | ratio | other peers |",
        "|---|---|---|---:|---:|---|---:|---|",
    ]
    for s in summaries:
        if s.ours is None:
            lines.append(f"| {s.title} | {s.detail} | no time: {_why(s)} | | | | | {_others(s, s.peers)} |")
            continue
        best = f"{_cell(s.best.provider)} | {_times(s.ratio(s.best))}" if s.best else "none | "
        impl = s.ours.provider.removeprefix("ctxfast").strip() or "its own choice"
        lines.append(
            f"| {s.title} | {s.detail} | {impl} | {number(s.ours.median_ms)} | {speed(s.ours)} | {best} "
            f"| {_others(s, s.peers[1:])} |"
        )
    return lines


def _why(s: Summary) -> str:
    chosen = next((row for row in s.absent if row.chosen), None)
    return f"{chosen.status}, {_cell(chosen.note)}" if chosen else "not measured"


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{number(ratio)}x" if ratio >= 1 else f"**{number(ratio)}x**"


def _others(s: Summary, rows: Sequence[ResultRow]) -> str:
    return "; ".join(f"{_cell(row.provider)} {_times(s.ratio(row))}" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _absent_lines(summaries: Sequence[Summary]) -> list[str]:
    """Who did not run, gathered by provider and reason."""
    reasons: dict[tuple[str, str], list[Summary]] = {}
    for s in summaries:
        for row in s.absent:
            loud = row.status.upper() + ": " if row.status in ("wrong", "error") else ""
            reasons.setdefault((row.provider, loud + row.note), []).append(s)
    if not reasons:
        return []
    lines = ["Not timed:", ""]
    for (provider, reason), where in sorted(reasons.items()):
        ops = sorted({s.first.op for s in where})
        lines.append(f"- {provider}: {reason} ({len(where)} case{'s' * (len(where) > 1)} of {', '.join(ops)})")
    return lines


# the plot

_WIN, _LOSS, _DOT, _INK, _FAINT = "#1b7f79", "#c8553d", "#9aa3ad", "#22272e", "#e3e6ea"


def png(document: dict[str, Any]) -> bytes:
    """The plot: one bar a case, from 1 to the fastest peer's ratio, on a logarithmic axis; dots are the other peers.

    Raises:
        RuntimeError: matplotlib is not installed, or no case has both our time and a peer's.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("benchmarks: the plot needs matplotlib: pip install matplotlib.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    from PIL import Image  # what matplotlib itself writes pictures with

    shown = [s for s in summarise(document["rows"]) if s.ours is not None and s.best is not None]
    if not shown:
        raise RuntimeError("benchmarks: there is nothing to plot: no case has both ctxfast's time and a peer's.")
    ratios = [[s.ratio(row) for row in s.peers] for s in shown]
    low, high = min(min(values) for values in ratios), max(max(values) for values in ratios)
    places = _places(shown)
    height = 1.3 + 0.26 * (places[-1] + 1)
    figure, axes = pyplot.subplots(figsize=(10, height), dpi=150)
    axes.set_xscale("log")
    axes.axvline(1, color=_INK, linewidth=1, zorder=3)
    for y, values in zip(places, ratios):
        best, colour = values[0], _WIN if values[0] >= 1 else _LOSS
        axes.barh(y, best - 1, left=1, height=0.62, color=colour, zorder=2)
        axes.scatter(values[1:], [y] * len(values[1:]), s=16, color=_DOT, edgecolors="white", linewidths=0.5, zorder=4)
        # The numbers stand in a column of their own, where no dot hides them.
        axes.annotate(
            f"{number(best)}x", (1, y), (44, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", ha="right", fontsize=8, weight="bold", color=colour,
        )  # fmt: skip
    axes.set_yticks(places, [f"{s.title}  ({s.detail})" for s in shown], fontsize=8)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    left, right = min(low, 1) / 1.2, max(high, 1) * 1.2
    axes.set_xlim(left, right)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if left <= tick <= right]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.grid(axis="x", color=_FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    where = document["facts"]["gpu" if document["device"] == "cuda" else "cpu"]
    top = figure.text(0.012, 1 - 0.22 / height, "ctxfast against the fastest peer", fontsize=12, color=_INK)
    top.set_weight("bold")
    figure.text(
        0.012, 1 - 0.44 / height,
        f"bar and number: the fastest peer's time / ctxfast's (right of 1x ctxfast is faster); dots: the other peers\n"
        f"{where}, {document['date'][:10]}, commit {document['commit']}",
        fontsize=8, color="#5b646e", va="top", linespacing=1.4,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.75 / height))
    stream, small = io.BytesIO(), io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    pyplot.close(figure)
    Image.open(stream).convert("RGB").quantize(32).save(small, "PNG", optimize=True)  # a quarter of the size
    return small.getvalue()


def _places(shown: Sequence[Summary]) -> list[float]:
    """Heights of the bars: a gap between ops."""
    places, y = [], 0.0
    for i, s in enumerate(shown):
        if i and s.first.op != shown[i - 1].first.op:
            y += 0.6
        places.append(y)
        y += 1
    return places


def write(document: dict[str, Any], beside: str | os.PathLike[str]) -> list[Path]:
    """Write the page, and the plot where there is something to draw, beside a result file; their paths."""
    path = Path(beside)
    written = []
    if any(s.ours is not None and s.best is not None for s in summarise(document["rows"])):
        picture = path.with_suffix(".png")
        write_bytes(picture, png(document))
        written.append(picture)
    page = path.with_suffix(".md")
    write_bytes(page, markdown(document, written[0].name if written else None).encode())
    return [page, *written]


# comparison


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Two result files row by row: times, speed-up, and whether it is more than noise.

    "faster" and "slower" need a change of 5 % and spreads (p20..p80) that do not overlap. Rows of one file only are
    listed, too. Peers move as the machine moves: they show what a change of ours is worth.
    """
    before = {(row.case, row.provider): row for row in old["rows"]}
    after = {(row.case, row.provider): row for row in new["rows"]}
    lines = [f"old: {_origin(old)}", f"new: {_origin(new)}"]
    if old["machine"] != new["machine"]:
        lines.append("These are different machines: only ratios between providers can be compared.")
    lines += ["", f"{'old ms':>9} {'new ms':>9} {'old/new':>8}            case: provider"]
    for key in [*after, *(key for key in before if key not in after)]:
        a, b = before.get(key), after.get(key)
        have_a, have_b = (row is not None and row.median_ms is not None for row in (a, b))
        if not have_a and not have_b:
            continue
        change = f"{a.median_ms / b.median_ms:7.2f}x" if have_a and have_b else " " * 8
        word = verdict(a, b) if have_a and have_b else ("only new" if have_b else "only old")
        old_ms, new_ms = (number(row.median_ms) if have else "-" for row, have in ((a, have_a), (b, have_b)))
        lines.append(f"{old_ms:>9} {new_ms:>9} {change:>8}  {word:<8}  {key[0]}: {key[1]}")
    return "\n".join(lines)


def verdict(old: ResultRow, new: ResultRow) -> str:
    """ "faster", "slower" or "same"."""
    if old.median_ms / new.median_ms >= _NOISE and new.p80_ms < old.p20_ms:
        return "faster"
    if new.median_ms / old.median_ms >= _NOISE and new.p20_ms > old.p80_ms:
        return "slower"
    return "same"


def _origin(document: dict[str, Any]) -> str:
    dirty = " (changed)" if document["dirty"] else ""
    return f"{document['machine']}, {document['date']}, commit {document['commit']}{dirty}"
