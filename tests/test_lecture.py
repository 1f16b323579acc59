# SPDX-License-Identifier: Apache-2.0
"""The notebook that walks the lecture runs, and shows what it says it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
CELLS = json.loads((DOCS / "lecture.ipynb").read_text(encoding="utf-8"))["cells"]


def test_it_is_stored_with_what_it_printed() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert code and all("id" in cell for cell in CELLS)
    printing = [cell for cell in code if "print(" in "".join(cell["source"])]
    assert all(cell["outputs"] for cell in printing)
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


@pytest.mark.slow
def test_it_runs(monkeypatch, capsys, minilm_dir) -> None:
    for module in ("ahocorasick_rs", "nervaluate", "matplotlib"):
        pytest.importorskip(module, reason=f"needs {module}")
    monkeypatch.chdir(DOCS)
    names: dict[str, object] = {}
    said = []
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"<cell {number}>", "exec"), names)
            said += capsys.readouterr().out.splitlines()
    f1 = {line[:17].strip(): float(line.split()[-1]) for line in said if line.startswith(("ELMo,", "characters alone"))}
    assert f1["ELMo, frozen"] > f1["characters alone"] + 0.2
    losses = [float(line.split()[-1]) for line in said if line.startswith(("guessing", "step "))]
    assert losses[0] == 6.21 and losses[-1] < losses[0] - 0.5
    (entity,) = [line for line in said if line.startswith("entity")]
    masked = [name for name in ("world bank", "new zealand", "red cross") if name not in entity]
    assert masked and all(word not in entity for name in masked for word in name.split())
