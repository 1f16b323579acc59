# SPDX-License-Identifier: Apache-2.0
"""Work spread over processes that do not outlive their parent."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

# multiprocessing's and concurrent.futures' pools hold both ends of their pipes in every worker, which waits for ever
# when the parent is killed. Here a worker holds its own end alone: the parent's end closes with the parent.


def spread(work: Callable[[Any], Any], tasks: Iterable[Any], workers: int) -> Iterator[Any]:
    """The results of ``work`` for each task, in the order in which they are done.

    Args:
        work: called in the workers; it, the tasks and what it gives can be pickled.
        tasks: read one by one, as workers come free.
        workers: processes at most; they start when there is something for them to do. With 1 or one task alone all is
            done here.

    Raises:
        Exception: what ``work`` raised.
    """
    tasks = iter(tasks)
    first = list(itertools.islice(tasks, 2))
    if workers < 2 or len(first) < 2:
        yield from map(work, itertools.chain(first, tasks))
        return
    # Not forked: the parent has threads, and maybe a GPU.
    context = multiprocessing.get_context("spawn")
    payload = pickle.dumps(work)
    running: dict[Connection, Any] = {}
    ours: Any  # a connection
    try:
        for task in itertools.chain(first, tasks):
            if len(running) < workers:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, payload), daemon=True)
                process.start()
                theirs.close()
            else:
                ours = wait(list(running))[0]
                process = running.pop(ours)
                yield _received(ours, process)
            ours.send(task)
            running[ours] = process
        while running:
            for ours in wait(list(running)):
                process = running.pop(ours)
                yield _received(ours, process)
                ours.close()
                process.join()
    finally:
        for ours, process in running.items():
            process.terminate()
            ours.close()


def _received(ours: Connection, process: Any) -> Any:
    try:
        is_done, value = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"ctxfast.training: a worker ended (exit code {process.exitcode}); if it was killed for lack of memory, "
            "use fewer workers or smaller shards."
        ) from None
    if not is_done:
        raise value
    return value


def _serve(ours: Connection, payload: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    work = pickle.loads(payload)
    while True:
        try:
            task = ours.recv()
        except EOFError:
            return
        try:
            answer = (True, work(task))
        except Exception as error:
            answer = (False, _sendable(error))
        try:
            ours.send(answer)
        except BrokenPipeError:
            return


def _sendable(error: Exception) -> Exception:
    """The error, or what it says where it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
