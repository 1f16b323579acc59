# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite's result files, pages, plots and comparisons."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from support.benchmark_rows import QUICK, document, row, tiny

from benchmarks import __main__ as program, committed, measure, page, peers, precision, report, results, senses

ROOT = Path(__file__).resolve().parents[1]

# files


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("AMD EPYC 7B13 64-Core Processor", "amd-epyc-7b13-64"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "intel-i7-8700"),
        ("", "unknown"),
    ],
)
def test_slug(name, expected):
    assert results.slug(name) == expected


def test_result_files_come_back_and_are_complete(tmp_path):
    case = tiny("scalar_mix")
    found = measure.measure(case, peers.providers(case), QUICK)
    description = results.describe("cpu", QUICK, "2 threads", ["--op", "scalar_mix"])
    path = results.place(str(tmp_path / "new"), description)
    results.save(path, description, found)
    loaded = results.load(path)
    assert path.name == f"{description['machine']}-{description['date'][:10]}-{description['commit']}.json"
    assert [each.provider for each in loaded["rows"]] == [each.provider for each in found]
    assert loaded["rows"][1].median_ms == pytest.approx(found[1].median_ms, rel=1e-4)
    assert loaded["facts"]["torch"] == torch.__version__ and loaded["dirty"] in (True, False, None)
    assert list(path.parent.iterdir()) == [path]  # no temporary file stays
    assert results.place(str(tmp_path / "new"), description).stem == path.stem + "-2"
    with pytest.raises(FileExistsError, match="--overwrite"):
        results.place(str(path), description)
    assert results.place(str(path), description, overwrite=True) == path


@pytest.mark.parametrize("content, words", [("{", "is not JSON"), ("[]", "schema None"), ('{"schema": 9}', "schema 9")])
def test_what_is_no_result_file_is_refused(tmp_path, content, words):
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match="there is no result file"):
        results.load(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        results.load(path)
    path.write_text(json.dumps({"schema": 1, "rows": [{"nonsense": 1}]}))
    with pytest.raises(ValueError, match="cannot read"):
        results.load(path)


# pages


@pytest.fixture
def pages():
    lost = "op/lost/float32/forward/cpu"
    return document(
        [
            row("ctxfast cpu", 2.0, ours=True, chosen=True),
            row("ctxfast reference", 6.0, ours=True),
            row("ctxfast triton", 3.0, ours=True),
            row("peer", 4.0),
            row("gone", None, status="not installed", note="not installed (pip install gone)"),
            row("ctxfast reference", 4.0, ours=True, chosen=True, case=lost),
            row("quick peer", 1.0, case=lost),
            row("bad peer", None, status="wrong", note="output 0 is off", case=lost),
        ]
    )


def test_summaries(pages):
    won, lost = report.summarise(pages["rows"])
    assert won.ours.provider == "ctxfast cpu" and won.best.provider == "peer"
    assert [each.provider for each in won.peers] == ["peer", "ctxfast reference"]
    assert [each.provider for each in won.siblings] == ["ctxfast triton"]
    assert won.ratio(won.best) == 2.0
    assert lost.ratio(lost.best) == 0.25 and not lost.siblings


def test_the_page_shows_losses_and_who_is_missing(pages):
    text = report.markdown(pages, "plot.png")
    assert "| op: w | float32 | cpu | 2 |" in text and "| peer | 2x | ctxfast reference 3x |" in text
    assert "| quick peer | **0.25x** |" in text
    assert "ctxfast triton, 1.5x" in text
    assert "- gone: not installed (pip install gone) (1 case of op)" in text
    assert "- bad peer: WRONG: output 0 is off" in text
    assert "(plot.png)" in text and "other programs kept 0.25 cores busy" in text


def test_the_page_of_a_case_without_our_time():
    rows = [row("ctxfast cpu", None, ours=True, chosen=True, status="wrong", note="output 0 is off"), row("peer", 4.0)]
    assert "no time: wrong, output 0 is off" in report.markdown(document(rows))


def test_page_and_plot_are_written_beside_the_file(pages, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot")
    text, picture = report.write(pages, tmp_path / "a.json")
    assert text.name == "a.md" and "(a.png)" in text.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    (only,) = report.write(document([row("peer", None, status="cannot run")]), tmp_path / "b.json")
    assert only.name == "b.md"


def test_the_html_page(pages):
    text = page.html(pages)
    titles = re.findall(r'<span class=what>(.*?)<small>.*?<span class="ratio (win|loss)">(.*?)</span>', text, re.S)
    assert titles == [("w", "win", "2x"), ("lost", "loss", "0.25x")]
    assert "1 of 2" in text and "not installed (pip install gone)" in text and "<b class=loss>WRONG</b>" in text
    # The axis holds the smallest and the largest ratio, and the bar of the lost case ends left of 1.
    places = [float(x) for x in re.findall(r'<rect x="([\d.]+)%"', text)]
    one = float(re.search(r'<line x1="([\d.]+)%"[^>]*stroke="var\(--ink\)"', text)[1])
    assert places[0] == pytest.approx(one, abs=0.01) and 0 < places[1] < one
    parser = HTMLParser()
    parser.feed(text)
    assert "http" not in text and "<script" not in text  # nothing is fetched


def test_the_html_page_shows_what_became_slower(pages):
    old = document(
        [row("ctxfast cpu", 1.0, ours=True, chosen=True), row("peer", 9.0), row("ctxfast reference", 6.0, ours=True)]
    )
    text = page.html(pages, old)
    assert "2 rows of ctxfast are in both files; 1 are slower, 0 faster" in text and "1 to 2 ms" in text
    assert "slower" not in page.html(pages)


def test_names_are_escaped_on_the_html_page():
    assert "<i>" not in page.html(document([row("<i>", 4.0), row("ctxfast cpu", 2.0, ours=True, chosen=True)]))


def test_compare():
    old = document([row("a", 4.0), row("b", 4.0), row("c", 4.0), row("gone", 1.0), row("never", None)])
    new = document([row("a", 2.0), row("b", 8.0), row("c", 4.1), row("new", 1.0), row("never", None)], commit="def")
    lines = {line.rsplit(": ")[-1]: line for line in report.compare(old, new).splitlines() if ": " in line}
    assert "2.00x  faster" in lines["a"] and "0.50x  slower" in lines["b"] and "same" in lines["c"]
    assert "only new" in lines["new"] and "only old" in lines["gone"] and "never" not in lines
    assert "different machines" in report.compare(old, document([], machine="other"))


def test_noise_is_no_change():
    old = row("a", 4.0, p20_ms=3.0, p80_ms=5.0)
    new = row("a", 2.0, p20_ms=1.0, p80_ms=3.5)
    assert report.verdict(old, new) == "same"
    assert report.verdict(old, dataclasses.replace(new, p80_ms=2.9)) == "faster"


# what is committed


def test_nothing_committed_is_superseded():
    assert committed.superseded() == {}


def test_what_is_published_is_what_the_committed_files_say():
    """Else: python -m benchmarks --readme."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert committed.with_tables(readme) == readme
    assert (results.FOLDER / "README.md").read_text(encoding="utf-8") == committed.index()
    with pytest.raises(ValueError, match="README lacks the lines"):
        committed.with_tables("no place for a table")


def test_every_result_file_has_its_page():
    pages = {path.stem for path in results.FOLDER.glob("*.md")} - {"README"}
    assert pages == {path.stem for path in results.FOLDER.glob("*.json")}
    assert {path.stem for path in results.FOLDER.glob("*.png")} <= pages


OP = "op/w/float32/forward/cpu"
OTHER = "op/other/float32/forward/cpu"


def _save(folder, name, date, rows, **more):
    results.save(folder / f"{name}.json", document([], date=date, **more), rows)
    (folder / f"{name}.md").write_text("page")


def _measured_case(case, peer, ms=2.0):
    return [row("ctxfast cpu", ms, ours=True, chosen=True, case=case), row(peer, 3.0, case=case)]


@pytest.fixture
def folder(tmp_path):
    """README's cases, then one run after another."""
    for_readme = [each for _, case, peer in committed._README for each in _measured_case(case, peer)]
    _save(tmp_path, "readme", "2026-01-01", for_readme, commit="readme")
    return tmp_path


def test_a_case_measured_again_leaves_the_older_file(folder):
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot")
    _save(folder, "all of it", "2026-01-02", _measured_case(OP, "peer"))
    _save(folder, "part of it", "2026-01-03", _measured_case(OP, "peer") + _measured_case(OTHER, "peer"))
    _save(folder, "newest", "2026-01-04", _measured_case(OP, "peer"))
    found = committed.superseded(folder)
    assert {path.stem: cases for path, cases in found.items()} == {"all of it": {OP}, "part of it": {OP}}
    assert len(committed.prune(folder)) == 2
    assert {path.stem for path in folder.glob("*.json")} == {"readme", "part of it", "newest"}
    assert not (folder / "all of it.md").exists()
    kept = results.load(folder / "part of it.json")
    assert {each.case for each in kept["rows"]} == {OTHER} and kept["taken_out"] == 1
    assert "1 case is left out here" in (folder / "part of it.md").read_text()
    assert committed.superseded(folder) == {} and committed.prune(folder) == []


@pytest.mark.parametrize(
    "later",
    [
        dict(peer="another peer"),
        dict(machine="other"),
        dict(ms=None),
        dict(case=OTHER),
    ],
    ids=lambda later: next(iter(later)),
)
def test_a_case_stays_that_no_later_run_replaces(folder, later):
    _save(folder, "old", "2026-01-02", _measured_case(OP, "peer"))
    machine = dict(machine=later["machine"]) if "machine" in later else {}
    rows = _measured_case(later.get("case", OP), later.get("peer", "peer"), later.get("ms", 2.0))
    _save(folder, "new", "2026-01-03", rows, **machine)
    assert committed.superseded(folder) == {}


def test_the_run_of_the_readme_stays_whole(folder):
    _, case, peer = committed._README[0]
    _save(folder, "new", "2026-01-03", _measured_case(case, peer, 1.0))
    assert committed.superseded(folder) == {}
    assert "commit readme" in committed.figures(folder) and "| 2 ms | " in committed.figures(folder)
    assert f"a peer is faster in 0 of {len(committed._README)} cases on a-cpu-2t." in committed.figures(folder)
    assert "| 1 ms | " in committed.index(folder)


def test_lost_cases_are_bold_and_counted(folder):
    _save(folder, "new", "2026-01-03", _measured_case(OP, "peer", 4.0))
    assert f"a peer is faster in 1 of {len(committed._README) + 1} cases on a-cpu-2t." in committed.figures(folder)
    assert "| op: w | float32 | 4 ms | peer | **0.75x** | [2026-01-03](new.md) |" in committed.index(folder)


def test_the_program_prunes_and_writes_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(committed, "prune", lambda: ["a.json: removed"])
    assert program.main(["--prune"]) == 0 and capsys.readouterr().out == "a.json: removed\n"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (results.FOLDER / "README.md").read_text(encoding="utf-8")
    stale = readme.replace("| BERT-Base, one text of 16 tokens |", "| old |").replace("| `lstm` |", "| `old` |")
    (tmp_path / "README").write_text(stale, encoding="utf-8")
    monkeypatch.setattr(program, "_README", tmp_path / "README")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert stale != readme and program.main(["--readme"]) == 0
    assert (tmp_path / "README").read_text(encoding="utf-8") == readme
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == index


@pytest.mark.parametrize("result", [precision.RESULT, senses.RESULT], ids=lambda result: result.name)
def test_pages_show_the_committed_results(result) -> None:
    """A page's table is what ``python -m benchmarks.NAME --docs`` writes."""
    found = result.load()
    assert result.stale_pages() == [] and found["dirty"] is False
    (page,) = result.pages
    text = (ROOT / page).read_text(encoding="utf-8")
    assert result.text(text, {**found, "rows": found["rows"][:1]}) != text
    with pytest.raises(ValueError, match="has no line"):
        result.text("a page without marks", found)


def test_precision_is_measured_in_every_dtype_of_both_models() -> None:
    by_model: dict[str, list[str]] = {}
    for measured in precision.RESULT.load()["rows"]:
        by_model.setdefault(measured["model"], []).append(measured["dtype"])
    assert list(by_model.values()) == [["float32", "bfloat16", "int8"]] * 2


def test_neighbours_of_equal_distance_count_by_their_share() -> None:
    """Two uses of each of two senses: a layer that tells them apart, one that errs, one in which all are the same."""
    right = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    wrong = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    vectors = np.stack([np.array(right), np.array(wrong), np.ones((4, 2)) / 2**0.5], axis=1)
    assert senses.accuracy(["a", "a", "b", "b"], vectors) == pytest.approx([1.0, 0.0, 1 / 3])


def test_senses_stand_in_eight_sentences_each() -> None:
    for word, pairs in senses.read(senses.SENTENCES).items():
        names = [sense for sense, _ in pairs]
        assert len(set(names)) == 2 and all(names.count(name) == 8 for name in names), word
        assert len({use.words for _, use in pairs}) == 16, word
