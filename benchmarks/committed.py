# SPDX-License-Identifier: Apache-2.0
"""The result files that are committed: which later ones supersede, the list of all; and README's tables."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxfast import functional as functional  # enters all ops in the table
from ctxfast._core import registry

from . import documented, report, results
from .measure import ResultRow

# README's table: cases in words, and what most people run in that precision today.
_HUGGING_FACE, _PLAIN = "Hugging Face, eager", "plain PyTorch, Python loop"
_RAGGED = "ragged 32 (fill 0.39)"
_README = (
    ("BERT-Base, 32 texts of 7 to 121 tokens", f"bert/bert-base {_RAGGED}/float32/forward/cpu", _HUGGING_FACE),
    ("the same in int8", f"bert/bert-base {_RAGGED}/float32+int8/forward/cpu", "Hugging Face, dynamic int8"),
    ("BERT-Base, one text of 128 tokens", "bert/bert-base 1x128/float32/forward/cpu", _HUGGING_FACE),
    ("BERT-Base, one text of 16 tokens", "bert/bert-base 1x16/float32/forward/cpu", _HUGGING_FACE),
    ("MiniLM-L6, 32 texts in bfloat16", f"bert/minilm {_RAGGED}/bfloat16/forward/cpu", _HUGGING_FACE),
    ("ELMo, one sentence of 20 words", "elmo/original 1x20 words/float32/forward/cpu", _PLAIN),
    ("ELMo, 32 such, bfloat16 products", "elmo/original 32x20 words/float32+bf16/forward/cpu", f"{_PLAIN}, bfloat16"),
)
Document = dict[str, Any]


def _documents(folder: Path) -> dict[Path, Document]:
    """Every result file, the newest first."""
    found = {path: results.load(path) for path in folder.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: item[1]["date"], reverse=True))


def _by_case(document: Document) -> dict[str, list[ResultRow]]:
    cases: dict[str, list[ResultRow]] = {}
    for row in document["rows"]:
        cases.setdefault(row.case, []).append(row)
    return cases


def _peers(rows: Sequence[ResultRow]) -> set[str]:
    return {row.provider for row in rows if not row.ours and row.median_ms is not None}


def _of_readme(documents: dict[Path, Document]) -> list[Document]:
    """The files of the newest commit that measured all of README's cases on one machine."""
    groups: dict[tuple[str, str], list[Document]] = {}
    for document in documents.values():
        groups.setdefault((document["machine"], document["commit"]), []).append(document)
    wanted = {case for _, case, _ in _README}
    for group in groups.values():
        if wanted <= {row.case for document in group for row in document["rows"] if row.chosen and row.median_ms}:
            return group
    raise ValueError("benchmarks: no commit has measured all cases of README's table on one machine.")


def superseded(folder: Path = results.FOLDER) -> dict[Path, set[str]]:
    """Cases by result file that a later file of the same machine has measured again, with all peers of the earlier.

    The files of README's table are left whole: its rows are of one commit.
    """
    documents = _documents(folder)
    kept = _of_readme(documents)
    later: dict[tuple[str, str], list[set[str]]] = {}
    found: dict[Path, set[str]] = {}
    for path, document in documents.items():
        for case, rows in _by_case(document).items():
            peers, before = _peers(rows), later.setdefault((document["machine"], case), [])
            if document not in kept and any(peers <= others for others in before):
                found.setdefault(path, set()).add(case)
            if any(row.chosen and row.median_ms for row in rows):
                before.append(peers)
    return found


def prune(folder: Path = results.FOLDER) -> list[str]:
    """Take superseded cases out of result files, pages and plots, and remove the files that hold no other; in words."""
    lines = []
    for path, cases in superseded(folder).items():
        document = results.load(path)
        rows = [row for row in document.pop("rows") if row.case not in cases]
        for beside in (path.with_suffix(".md"), path.with_suffix(".png")):
            beside.unlink(missing_ok=True)
        if not rows:
            path.unlink()
            lines.append(f"{path.name}: removed, all of its {len(cases)} cases were measured again later")
            continue
        document["taken_out"] = document.get("taken_out", 0) + len(cases)
        results.save(path, document, rows)
        report.write(results.load(path), path)
        lines.append(f"{path.name}: {len(cases)} cases taken out, which were measured again later")
    return lines


_Newest = tuple[Path, Document, report.Summary]


def _by_machine(folder: Path) -> dict[str, list[_Newest]]:
    """Every case of every machine where it was measured last, both in the order of their names."""
    found: dict[tuple[str, str], _Newest] = {}
    for path, document in _documents(folder).items():
        for s in report.summarise(document["rows"]):
            if s.ours is not None and s.best is not None:
                found.setdefault((document["machine"], s.case), (path, document, s))
    machines: dict[str, list[_Newest]] = {}
    for machine, case in sorted(found):
        machines.setdefault(machine, []).append(found[machine, case])
    return machines


def _lost(cases: Sequence[_Newest]) -> int:
    """In how many a peer is faster."""
    return sum(s.ratio(s.best) < 1 for _, _, s in cases)


def _ratio(s: report.Summary, row: ResultRow) -> str:
    """In bold where the peer is faster."""
    text = f"{s.ratio(row):.2f}x"
    return f"**{text}**" if s.ratio(row) < 1 else text


def index(folder: Path = results.FOLDER) -> str:
    """The page of the folder: the newest figure of every machine and case."""
    lines = [
        "# The newest figures",
        "",
        "Written by `python -m benchmarks --readme`: every case of every machine, where it was measured last. Ratio: "
        "the fastest peer's time over ctxfast's, measured in turn in one run; **bold** where the peer is faster. All "
        "peers and what the machine did meanwhile: the page behind the date.",
    ]
    for machine, group in _by_machine(folder).items():
        lines += [
            "",
            f"## {machine}: {len(group)} cases, a peer is faster in {_lost(group)}",
            "",
            "| case | dtype, pass | ctxfast | fastest peer | ratio | measured |",
            "|---|---|---:|---|---:|---|",
        ]
        for path, document, s in group:
            page = f"[{document['date'][:10]}]({path.stem}.md)"
            time = results.number(s.ours.median_ms)
            lines.append(f"| {s.title} | {s.detail} | {time} ms | {s.best.provider} | {_ratio(s, s.best)} | {page} |")
    return "\n".join(lines) + "\n"


def figures(folder: Path = results.FOLDER) -> str:
    """README's table, with the sentences that say where it comes from and how many cases are lost."""
    documents = _documents(folder)
    group = _of_readme(documents)
    first = group[0]
    summaries = {s.case: s for document in group for s in report.summarise(document["rows"])}
    names = sorted(path.stem for path, document in documents.items() if document in group)
    pages = ", ".join(f"[{number}](benchmarks/results/{name}.md)" for number, name in enumerate(names, 1))
    lines = [
        f"{first['facts']['cpu']}, {first['date'][:10]}, commit {first['commit']}; float32 unless said. Ratio: the "
        f"peer's time over ctxfast's, measured in turn. All rows and peers of this run: {pages}.",
        "",
        "| case | ctxfast | fastest peer | ratio | as most run it | ratio |",
        "|---|---:|---|---:|---|---:|",
    ]
    for words, case, usual in _README:
        s = summaries[case]
        peers = [row for row in s.peers if not row.ours]
        shown = (peers[0], next(row for row in peers if row.provider == usual))
        cells = [cell for row in shown for cell in (row.provider, _ratio(s, row))]
        lines.append(f"| {words} | {results.number(s.ours.median_ms)} ms | {' | '.join(cells)} |")
    lost = ", ".join(f"{_lost(of)} of {len(of)} cases on {machine}" for machine, of in _by_machine(folder).items())
    gpu = "" if any(document["device"] == "cuda" for document in documents.values()) else " No GPU has been measured."
    lines += ["", f"In the [newest figures](benchmarks/results/README.md) a peer is faster in {lost}.{gpu}"]
    return "\n".join(lines) + "\n"


def ops() -> str:
    """README's table of ops: the first sentence of each docstring, and the implementations."""
    lines = ["| op | what it computes | implementations |", "|---|---|---|"]
    for spec in registry.OPS.values():
        paragraph = inspect.getdoc(spec.declaration).partition("\n\n")[0]
        sentence = " ".join(paragraph.split()).removesuffix(".").replace("``", "`")
        lines.append(f"| `{spec.name}` | {sentence} | {', '.join(map(str, spec.all_impls))} |")
    return "\n".join(lines) + "\n"


def with_tables(readme: str, folder: Path = results.FOLDER) -> str:
    """README with its tables rendered anew."""
    for name, table in (("ops", ops()), ("figures", figures(folder))):
        begin, end = f"<!-- {name}: python -m benchmarks --readme -->\n", f"<!-- end of {name} -->\n"
        written = documented.between(readme, begin, end, table)
        if written is None:
            raise ValueError(f"benchmarks: README lacks the lines {begin.strip()!r} and {end.strip()!r}.")
        readme = written
    return readme
