"""Processes that compile candidates side by side: `worker` started as often as there are cores, each fed by a thread.

Processes of their own, and not multiprocessing's: these would run the user's main module again, which few training scripts
expect.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from attnfx.lowering.configs import Choice
from attnfx.lowering.tuning.entries import choice_to_data

#: Processes at most, and seconds without work after which they end.
MOST, IDLE = 16, 60.0


@dataclass(frozen=True)
class Compiled:
    """Bytes of shared memory, registers and spilled bytes a thread of a candidate; or why it does not compile."""

    shared: int = 0
    registers: int = 0
    spills: int = 0
    seconds: float = 0.0
    error: str = ""


class Compilers:
    """A pool of workers; they start at the first job, and end with :meth:`close` or with this process."""

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or min(MOST, cores())
        self._threads = ThreadPoolExecutor(self.processes, "attnfx-tune", initializer=self._start)
        self._own = threading.local()
        self._lock, self._closed = threading.Lock(), False
        self._running: list[subprocess.Popen[str]] = []

    def compile(self, job: Mapping[str, Any], choices: Sequence[Choice], seconds: float) -> Iterator[tuple[Choice, Compiled]]:
        """Each of ``choices`` that is compiled within the time, in order; ``job`` is the worker's, without "config".

        What has not begun by then is dropped, and a process that is still busy with one of them is ended.
        """
        futures = [self._threads.submit(self._ask, json.dumps({**job, "config": choice_to_data(c)})) for c in choices]
        wait(futures, max(seconds, 0.0))
        late = [f for f in futures if not f.cancel() and not f.done()]
        if late:
            self._end_all()
        for choice, future in zip(choices, futures, strict=True):
            if not future.cancelled() and future not in late:
                yield choice, future.result()

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._end_all()

    def _ask(self, line: str) -> Compiled:
        """The answer of this thread's worker, started anew where it has ended."""
        worker: subprocess.Popen[str] | None = getattr(self._own, "worker", None)
        if worker is None or worker.poll() is not None:
            worker = self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except (OSError, ValueError):
            answer = ""
        if not answer:
            return Compiled(error="the compiling process ended before it answered")
        data = json.loads(answer)
        data.pop("hashes", None)
        return Compiled(**data)

    def _start(self) -> subprocess.Popen[str]:
        # the modules of this process are found by the worker too; it must not touch the GPU that is being timed
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "attnfx.lowering.tuning.worker"]
        pipe = subprocess.PIPE
        with self._lock:
            if self._closed:
                raise RuntimeError("the compiling processes have been ended")
            worker = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment, encoding="utf-8"
            )
            self._running.append(worker)
        self._own.worker = worker
        return worker

    def _end_all(self) -> None:
        with self._lock:
            running, self._running = self._running, []
        for worker in running:
            worker.kill()
        for worker in running:
            worker.wait()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Shared:
    """The pool that searches of this process share, ended when it has been idle."""

    def __init__(self) -> None:
        self.lock, self.pool, self.timer = threading.Lock(), None, None  # type: Any, Compilers | None, threading.Timer | None

    def get(self) -> Compilers:
        with self.lock:
            if self.timer is not None:
                self.timer.cancel()
            if self.pool is None:
                self.pool = Compilers()
            return self.pool

    def rest(self) -> None:
        """Nobody needs it just now."""
        with self.lock:
            self.timer = threading.Timer(IDLE, self.end)
            self.timer.daemon = True
            self.timer.start()

    def end(self) -> None:
        with self.lock:
            if self.pool is not None:
                self.pool.close()
            self.pool = self.timer = None


shared = _Shared()
atexit.register(shared.end)
