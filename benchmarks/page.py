# SPDX-License-Identifier: Apache-2.0
"""One HTML page of a result file: every case with its plot, every provider's time, memory and error, and, beside an
older file, what became slower. It needs nothing else: no script, no picture, no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .measure import ResultRow
from .report import Summary, summarise, verdict
from .results import number, speed

_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --bed: #fff; --win: #1b7f79;
  --loss: #c04a2b; --dot: #8c959f; --raised: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --bed: #0d1117;
  --win: #3fb6ab; --loss: #f0805f; --dot: #7d8590; --raised: #151b23; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--bed); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p, dl { margin: .25rem 0; } .soft, dt { color: var(--soft); } code { font-size: .9em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: .9rem; } dd { margin: 0; }
.sums { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.sums div { background: var(--raised); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; }
.sums b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); }
summary, .axis { display: grid; grid-template-columns: 17rem 1fr 4.5rem 13.5rem; gap: .25rem 1rem;
  align-items: center; }
summary { padding: .45rem 0; cursor: pointer; list-style: none; }
.axis svg { grid-column: 2; height: 1rem; overflow: visible; font-size: .75rem; fill: var(--soft); }
summary::-webkit-details-marker { display: none; }
summary:hover, details[open] > summary { background: var(--raised); }
.what small, .best small { display: block; color: var(--soft); }
.ratio { text-align: right; font-weight: 650; font-variant-numeric: tabular-nums; }
.win { color: var(--win); } .loss { color: var(--loss); } .plot { width: 100%; height: 1.6rem; display: block; }
.table { overflow-x: auto; padding: .25rem 0 .9rem; }
table { border-collapse: collapse; font-size: .87rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th:first-child, td:first-child, td.note { text-align: left; } th { font-weight: 500; color: var(--soft); border: 0; }
td.note { white-space: normal; color: var(--soft); } tr.ours td:not(.note) { font-weight: 600; }
@media (max-width: 46rem) { summary, .axis { grid-template-columns: 1fr 4.5rem; } .axis svg { grid-column: 1 / -1; }
  .plot { grid-column: 1 / -1; grid-row: 3; }
  .best { grid-column: 1 / -1; grid-row: 2; } .best small { display: inline; } }
"""


def html(document: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """The page.

    Args:
        document: a result file, see ``results.load``.
        before: an older one, to be compared with; None for none.
    """
    summaries = summarise(document["rows"])
    title = f"ctxfast benchmarks: {document['machine']}, {document['date'][:10]}"
    parts = [f"<h1>{escape(title)}</h1>", _facts(document), _sums(summaries)]
    old = {} if before is None else {(row.case, row.provider): row for row in before["rows"]}
    if before is not None:
        parts.append(_changes(document, before, old))
    axis = _Axis(summaries)
    for op in dict.fromkeys(s.first.op for s in summaries):
        parts.append(f'<h2>{escape(op)}</h2><div class="axis">{axis.labels()}</div>')
        parts += [_case(s, axis, old) for s in summaries if s.first.op == op]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _facts(document: dict[str, Any]) -> str:
    facts, settings = document["facts"], document["settings"]
    on_gpu = document["device"] == "cuda"
    dirty = " with changes that are not committed" if document["dirty"] else ""
    busy = settings.get("others_kept_busy")
    load = "unknown" if busy is None else f"{number(busy)} cores kept busy by other programs"
    found = {
        "machine": facts["gpu"] if on_gpu else f"{facts['cpu']} ({', '.join(document['instruction_sets'])})",
        "versions": f"ctxfast {facts['ctxfast']}, torch {facts['torch']}, Python {facts['python']}",
        "commit": document["commit"] + dirty,
        "command": document["command"],
        "measured with": f"{settings['threads']}; {settings['seconds_per_case']:g} s a case",
        "load": load,
    }
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in found.items())
    return (
        f"<dl>{lines}</dl><p class=soft>Everybody was held to the right result before being timed; rounds in turn, "
        "medians, p20 to p80. A bar reaches from 1 to the fastest peer's time over ctxfast's: to the right ctxfast is "
        "faster; dots are the other peers. A dashed line is the floor: where somebody would be who took no longer than "
        "memory or the arithmetic takes, both measured in this run. Open a case for everybody's time, memory and error."
        "</p>"
    )


def _sums(summaries: Sequence[Summary]) -> str:
    ratios = [s.ratio(s.best) for s in summaries if s.ours is not None and s.best is not None]
    if not ratios:
        return "<p>No case has both ctxfast's time and a peer's.</p>"
    won = sum(ratio >= 1 for ratio in ratios)
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    wrong = sum(row.status in ("wrong", "error") for s in summaries for row in s.absent)
    figures = {
        "cases ahead of every peer": f"{won} of {len(ratios)}",
        "times the fastest peer's speed (geometric mean)": number(middle),
        "times at the least": number(min(ratios)),
        "wrong or broken providers": str(wrong),
    }
    return '<div class="sums">' + "".join(f"<div><b>{v}</b>{escape(k)}</div>" for k, v in figures.items()) + "</div>"


def _changes(document: dict[str, Any], before: dict[str, Any], old: dict[tuple[str, str], ResultRow]) -> str:
    """Our rows that are slower or faster than before by more than noise."""
    found: dict[str, list[str]] = {"slower": [], "faster": []}
    both = 0
    for row in document["rows"]:
        past = old.get((row.case, row.provider))
        if not row.ours or past is None or row.median_ms is None or past.median_ms is None:
            continue
        both += 1
        if (word := verdict(past, row)) in found:
            change = f"{number(past.median_ms)} to {number(row.median_ms)} ms"
            found[word].append(f"<tr><td>{escape(f'{row.case}: {row.provider}')}</td><td>{change}</td></tr>")
    where = f"{before['machine']}, {before['date'][:10]}, commit {before['commit']}"
    lines = [f"<h2>Since {escape(where)}</h2>"]
    if before["machine"] != document["machine"]:
        lines.append("<p>Another machine: only ratios between providers can be compared.</p>")
    lines.append(f"<p>{both} rows of ctxfast are in both files; {len(found['slower'])} are slower, "
                 f"{len(found['faster'])} faster by 5 % and more than their spreads.</p>")  # fmt: skip
    for word, rows in found.items():
        if rows:
            lines.append(
                f'<div class="table"><table><tr><th>{word}</th><th>median</th></tr>{"".join(rows)}</table></div>'
            )
    return "".join(lines)


def _floor(s: Summary) -> float | None:
    """The floor's time over ctxfast's."""
    return None if s.ours is None else s.ours.of_floor


class _Axis:
    """Places on a logarithmic scale that all plots of the page share, in hundredths of their width."""

    def __init__(self, summaries: Iterable[Summary]) -> None:
        ratios = [s.ratio(row) for s in summaries for row in s.peers]
        ratios += [_floor(s) for s in summaries]
        known = [ratio for ratio in ratios if ratio] or [1.0]
        self._low = math.log(min(*known, 1.0) / 1.1)
        self._span = math.log(max(*known, 2.0) * 1.1) - self._low

    def at(self, ratio: float) -> float:
        return 100 * (math.log(ratio) - self._low) / self._span

    def ticks(self) -> list[float]:
        return [tick for tick in _TICKS if 0 <= self.at(tick) <= 100]

    def labels(self) -> str:
        """The ticks' numbers, for the line above plots."""
        words = (f'<text x="{self.at(t):.2f}%" y="80%" text-anchor="middle">{t:g}x</text>' for t in self.ticks())
        return f'<svg class="plot" aria-hidden="true">{"".join(words)}</svg>'


def _plot(s: Summary, axis: _Axis) -> str:
    lines = []
    for tick in axis.ticks():
        colour = "var(--ink)" if tick == 1 else "var(--line)"
        x = f"{axis.at(tick):.2f}%"
        lines.append(f'<line x1="{x}" x2="{x}" y1="0" y2="100%" stroke="{colour}"/>')
    ratios = [(row, s.ratio(row)) for row in s.peers]
    if s.ours is not None and ratios:
        one, best = axis.at(1), ratios[0][1] or 1.0
        left, right = sorted((one, axis.at(best)))
        colour = "var(--win)" if best >= 1 else "var(--loss)"
        lines.append(
            f'<rect x="{left:.2f}%" width="{max(right - left, 0.3):.2f}%" y="28%" height="44%" rx="2" fill="{colour}"/>'
        )
        for row, ratio in ratios[1:]:
            place = f'cx="{axis.at(ratio or 1.0):.2f}%" cy="50%" r="3.5"'
            lines.append(f'<circle {place} fill="var(--dot)"><title>{_ratio_words(row, ratio)}</title></circle>')
    if floor := _floor(s):
        x = f"{axis.at(floor):.2f}%"
        lines.append(
            f'<line x1="{x}" x2="{x}" y1="8%" y2="92%" stroke="var(--soft)" stroke-dasharray="3 2">'
            f"<title>floor: {_of_floor(floor)} of ctxfast's time</title></line>"
        )
    label = escape(f"{s.title}: ratio on a logarithmic scale")
    return f'<svg class="plot" role="img" aria-label="{label}">{"".join(lines)}</svg>'


def _ratio_words(row: ResultRow, ratio: float | None) -> str:
    return escape(f"{row.provider}: {number(ratio)}x")


def _case(s: Summary, axis: _Axis, old: dict[tuple[str, str], ResultRow]) -> str:
    what = f"<span class=what>{escape(s.first.workload)}<small>{escape(s.detail)}</small></span>"
    ratio = s.ratio(s.best) if s.best is not None else None
    if s.ours is None:
        best = "<small>no time of ctxfast's</small>"
    elif s.best is None:
        best = f"{number(s.ours.median_ms)} ms <small>no peer</small>"
    else:
        best = f"{number(s.ours.median_ms)} ms <small>{escape(s.best.provider)}: {number(s.best.median_ms)} ms</small>"
    word = "" if ratio is None else "win" if ratio >= 1 else "loss"
    shown = "" if ratio is None else f"{number(ratio)}x"
    rows = [*((s.ours,) if s.ours else ()), *s.siblings, *s.peers, *s.absent]
    columns = [name for name in _COLUMNS if _is_shown(name, rows, old)]
    table = "".join(_provider(s, row, old.get((row.case, row.provider)), columns) for row in rows)
    heads = "".join(f"<th>{name}</th>" for name in ("", *columns, ""))
    return (
        f'<details><summary>{what}{_plot(s, axis)}<span class="ratio {word}">{shown}</span>'
        f'<span class="best">{best}</span></summary><div class="table"><table><tr>{heads}</tr>{table}</table></div>'
        "</details>"
    )


# Column -> what it says of a row of a case, beside an older one.
_COLUMNS: dict[str, Callable[[Summary, ResultRow, ResultRow | None], str]] = {
    "ms": lambda s, row, past: number(row.median_ms),
    "p20 to p80": lambda s, row, past: f"{number(row.p20_ms)} to {number(row.p80_ms)}",
    "p95": lambda s, row, past: number(row.p95_ms),
    "p99": lambda s, row, past: number(row.p99_ms),
    "before": lambda s, row, past: number(None if past is None else past.median_ms),
    "ratio": lambda s, row, past: f"{number(s.ratio(row))}x",
    "rate": lambda s, row, past: speed(row) or "-",
    "of floor": lambda s, row, past: "-" if row.of_floor is None else _of_floor(row.of_floor),
    "MiB": lambda s, row, past: "-" if row.memory_mib is None else f"{row.memory_mib:,.1f}",
    "error": lambda s, row, past: _small(row.error),
    "bound": lambda s, row, past: _small(row.bound),
}


def _is_shown(column: str, rows: Sequence[ResultRow], old: Mapping[Any, ResultRow]) -> bool:
    if column in ("p95", "p99"):
        return any(row.p99_ms is not None for row in rows)
    return column != "before" or bool(old)


def _provider(s: Summary, row: ResultRow, past: ResultRow | None, columns: Sequence[str]) -> str:
    mark = ' class="ours"' if row.chosen else ""
    name = escape(row.provider) + (" *" if row.chosen else "")
    if row.median_ms is None:
        loud = "" if row.status in ("not installed", "cannot run") else f"<b class=loss>{row.status.upper()}</b> "
        span = len(columns) + 1
        return f'<tr{mark}><td>{name}</td><td class="note" colspan="{span}">{loud}{escape(row.note)}</td></tr>'
    filled = "".join(f"<td>{escape(_COLUMNS[column](s, row, past))}</td>" for column in columns)
    return f'<tr{mark}><td>{name}</td>{filled}<td class="note">{escape(row.note)}</td></tr>'


def _of_floor(share: float) -> str:
    return f"{100 * share:.0f} %"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"
