# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: measure, print, write result files and reports. Exit code 1 if any provider was wrong."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import cases, committed, measure, page, report, results
from .peers import providers

_PATHS = ("--json", "--page", "--since")
_README = Path(__file__).resolve().parents[1] / "README.md"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--set",
        choices=("small", "full", "latency"),
        default="small",
        help="about 2 or 10 minutes on 2 cores; latency: one text at a time, after pauses and beside busy programs",
    )
    what.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="only this op or model; may be repeated"
    )
    what.add_argument("--models", action="store_true", help="whole models too")
    what.add_argument("--case", action="append", default=[], metavar="TEXT", help="only cases whose id holds this text")
    what.add_argument(
        "--provider", action="append", default=[], metavar="TEXT", help="only peers whose name holds this"
    )
    what.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    what.add_argument("--gpu", action="store_const", const="cuda", dest="device", help="the same as --device cuda")
    how = parser.add_argument_group("how")
    how.add_argument("--seconds", type=float, default=1.0, metavar="N", help="for the rounds of one case (default 1)")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores of this process)")
    how.add_argument("--compile", action="store_true", help="torch.compile peers too (minutes to warm up)")
    how.add_argument("--graphs", action="store_true", help="on a GPU, also time everybody in a CUDA graph")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="PATH", help="write a result file: a .json path, or a folder")
    out.add_argument("--report", action="store_true", help="also write a page and a plot beside the result file")
    out.add_argument("--page", metavar="FILE.html", help="also write one HTML page: plots, times, memory, errors")
    out.add_argument(
        "--since", metavar="OLD.json", help="on that page, show what is slower or faster than in this file"
    )
    out.add_argument("--overwrite", action="store_true", help="replace the files that --json and --page name")
    out.add_argument("--list", action="store_true", help="print the cases and stop")
    out.add_argument("--base", nargs=2, metavar=("OLD.json", "NEW.json"), help="compare two result files and stop")
    out.add_argument("--render", metavar="FILE.json", help="write the pages of a result file and stop")
    out.add_argument("--prune", action="store_true", help="take what later runs replace out of the results and stop")
    out.add_argument("--readme", action="store_true", help="write README's tables and the list of results and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.base:
            print(report.compare(*(results.load(path) for path in options.base)))
            return 0
        before = _check_page(options)
        if options.render:
            document = results.load(options.render)
            written = (
                report.write(document, options.render) if options.page is None else [_page(options, document, before)]
            )
            print("\n".join(map(str, written)))
            return 0
        if options.prune:
            print("\n".join(committed.prune()))
            return 0
        if options.readme:
            _README.write_text(committed.with_tables(_README.read_text(encoding="utf-8")), encoding="utf-8")
            (results.FOLDER / "README.md").write_text(committed.index(), encoding="utf-8")
            return 0
        return _run(options, argv, before)
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


def _check_page(options: argparse.Namespace) -> dict[str, Any] | None:
    """The older result file that the page is to show, if any; refuse a page that cannot be written."""
    if options.page is None:
        if options.since is not None:
            raise ValueError("benchmarks: --since is given without --page; expected the page that shows it.")
        return None
    path = Path(options.page)
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"benchmarks: --page {path} is no file in a folder that exists.")
    if path.exists() and not options.overwrite:
        raise FileExistsError(f"benchmarks: {path} is there already. Name another file, or pass --overwrite.")
    return None if options.since is None else results.load(options.since)


def _page(options: argparse.Namespace, document: dict[str, Any], before: dict[str, Any] | None) -> Path:
    results.write_bytes(Path(options.page), page.html(document, before).encode())
    return Path(options.page)


def _run(options: argparse.Namespace, argv: Sequence[str], before: dict[str, Any] | None) -> int:
    selected = cases.select(options.device, options.set, options.op, options.models, options.case)
    if options.list:
        print("\n".join(case.id for case in selected))
        return 0
    if not selected:
        raise ValueError("benchmarks: no case is left; --list prints what there is.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("benchmarks: --device cuda needs a GPU that torch can see; torch sees none.")
    settings = measure.Settings(
        seconds=options.seconds, graphs=options.graphs, compile=options.compile, providers=tuple(options.provider)
    )
    if options.threads:
        settings.threads = options.threads
    threads = measure.set_threads(settings.threads)
    description = results.describe(options.device, settings, threads, _without_paths(argv))
    load = description["settings"]["load_before"]
    if load > 0.5 and options.device == "cpu":
        print(
            f"load is {load}: other programs share these cores, so times will be off, and ratios too", file=sys.stderr
        )
    path, written = None, []
    if options.json or options.report:
        path = results.place(options.json, description, overwrite=options.overwrite)
    started, others, rows = time.monotonic(), results.Others(), []
    for i, case in enumerate(selected):
        print(f"[{i + 1}/{len(selected)}, {time.monotonic() - started:.0f} s] {case.id}", file=sys.stderr, flush=True)
        found = measure.measure(case, providers(case, compile=settings.compile), settings)
        print(results.case_table(found), end="\n\n", flush=True)
        rows += found
        description["settings"]["others_kept_busy"] = others.cores()
        if path is not None:  # after every case, so that a run that is stopped leaves what it has
            results.save(path, description, rows)
    print("* what ctxfast runs by itself; ratio: a row's time over that one's. Times: median, p20..p80.")
    if path is not None:
        written = [path, *(report.write(results.load(path), path) if options.report else ())]
    if options.page is not None:
        written.append(_page(options, {**description, "rows": rows}, before))
    for name in written:
        print(name, file=sys.stderr)
    return _verdict(rows)


def _without_paths(argv: Sequence[str]) -> list[str]:
    """The command as a result file tells it: where files went says nothing about what was measured."""
    kept, words = [], iter(argv)
    for word in words:
        if word in _PATHS:
            next(words, None)
        elif not word.startswith(tuple(f"{path}=" for path in _PATHS)):
            kept.append(word)
    return kept


def _verdict(rows: Sequence[measure.ResultRow]) -> int:
    """1 if a provider was wrong or broke, 0 otherwise."""
    bad = [row for row in rows if row.status in ("wrong", "error")]
    for row in bad:
        print(f"{row.status}: {row.case}: {row.provider}: {row.note}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
