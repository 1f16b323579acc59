# SPDX-License-Identifier: Apache-2.0
"""The README's examples, pasted in order into one Python and one shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _pasted(kind: str) -> str:
    return "\n".join(text for found, text in BLOCKS if found == kind)


def _run(command: list[str], folder: Path) -> str:
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    more = {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder, env={**os.environ, **more})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_every_block_is_run_or_makes_the_tree() -> None:
    """Blocks without a language hold the Makefile's targets."""
    others = [text for kind, text in BLOCKS if kind not in ("python", "sh")]
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in "".join(others).splitlines():
        made = re.fullmatch(r"make ([\w-]+) +# .+", line)
        assert made and f"\n{made[1]}:" in targets, line
    assert len(others) == 1 and _pasted("python") and _pasted("sh")


def test_its_python(tmp_path, minilm_dir) -> None:
    lines = [*_pasted("python").splitlines(), "print(sentences.shape, words[0].shape, hidden.shape[2])"]
    last = _run([sys.executable, "-c", "\n".join(lines)], tmp_path).splitlines()[-1]
    assert last == "(2, 384) (7, 4, 384) 384"


@pytest.mark.slow
def test_its_shell_lines(tmp_path, minilm_dir) -> None:
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data")
    _run(["bash", "-e", "-u", "-o", "pipefail", "-c", _pasted("sh")], tmp_path)
    made = {path.name for path in (tmp_path / "examples" / "data").iterdir()}
    assert made >= {"vectors.hdf5", "sentences.safetensors", "bank.png", "tagger", "bert-tagger", "bert", "elmo"}
