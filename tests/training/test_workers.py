# SPDX-License-Identifier: Apache-2.0
"""Work spread over processes: what comes back, what fails, and that no process is left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxfast.training.pretraining.knowledge_spans import ChineseWords, Gazetteer
from ctxfast.training.pretraining.workers import spread

HERE = Path(__file__).parent


def square(number: int) -> tuple[int, int]:
    if number == 13:
        raise ValueError("ctxfast.training: 13 brings bad luck")
    if number == 14:
        os._exit(9)
    return number * number, os.getpid()


def slow(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(2)


def test_every_task_is_done_once_and_elsewhere() -> None:
    found = list(spread(square, range(12), 2))
    assert sorted(value for value, _ in found) == [number * number for number in range(12)]
    assert os.getpid() not in {process for _, process in found} and len({process for _, process in found}) <= 2
    assert list(spread(square, iter([5]), 4)) == [(25, os.getpid())]
    assert [process for _, process in spread(square, range(3), 1)] == [os.getpid()] * 3
    assert list(spread(square, [], 2)) == []


def test_what_fails_there_is_raised_here() -> None:
    with pytest.raises(ValueError, match="13 brings bad luck"):
        list(spread(square, [1, 2, 13, 3, 4], 2))
    with pytest.raises(RuntimeError, match=r"a worker ended \(exit code 9\)"):
        list(spread(square, [1, 2, 14, 3, 4], 2))


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    script = f"""
from test_workers import slow, spread
if __name__ == "__main__":
    list(spread(slow, [{str(tmp_path)!r}] * 9, 2))
"""
    (tmp_path / "run.py").write_text(script)
    parent = subprocess.Popen([sys.executable, tmp_path / "run.py"], env={**os.environ, "PYTHONPATH": path})
    while len(workers := [int(file.name) for file in tmp_path.iterdir() if file.name.isdigit()]) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers wait for a parent that is gone"
        time.sleep(0.1)


def test_sources_of_spans_can_be_sent() -> None:
    names = Gazetteer(["Old Town"], "phrase", ignore_case=False)
    for source, text in ((names, "an Old Town"), (ChineseWords(), "省会")):
        assert source.spans(text) and pickle.loads(pickle.dumps(source)).spans(text) == source.spans(text)


class Awkward(Exception):
    """Cannot be made again from what it keeps."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


def _awkward(number: int) -> int:
    raise Awkward(number, "it went wrong")


def test_an_error_that_cannot_be_sent_says_what_it_said() -> None:
    with pytest.raises(RuntimeError, match="Awkward: it went wrong"):
        list(spread(_awkward, range(3), 2))
