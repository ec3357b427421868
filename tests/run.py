"""The test suite, some files at a time in as many processes as there are cores (four at most): most tests wait.

    python tests/run.py [options of pytest]

Each process is a pytest of its own, with shared memory of its own; `python -m pytest` runs all in one. What a process
says is printed when it ends. Leaves with status 1 if a test failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue

TESTS = Path(__file__).parent
FILES_AT_A_TIME = 8
MOST_PROCESSES = 4
#: pytest's exit status where options left no test.
NOTHING_RAN = 5
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed|deselected)")


def groups() -> list[list[Path]]:
    """All test files, dealt out so that neighbours in the alphabet, which are alike, are apart."""
    files = sorted(TESTS.glob("test_*.py"))
    count = -(-len(files) // FILES_AT_A_TIME)
    return [files[number::count] for number in range(count)]


class Suite:
    """Takes groups from a queue and counts what became of their tests."""

    def __init__(self, options: list[str]) -> None:
        self.options = options
        self.queue: SimpleQueue[list[Path]] = SimpleQueue()
        self.counts: dict[str, int] = {}
        self.failed = False
        self._printing = threading.Lock()

    def work(self) -> None:
        while True:
            try:
                files = self.queue.get_nowait()
            except Empty:
                return
            command = [sys.executable, "-m", "pytest", "-q", *self.options, *map(str, files)]
            run = subprocess.run(
                command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            with self._printing:
                print(run.stdout, end="", flush=True)
                self.failed |= run.returncode not in (0, NOTHING_RAN)
                for number, outcome in _COUNTS.findall(run.stdout.rstrip().rpartition("\n")[2]):
                    self.counts[outcome] = self.counts.get(outcome, 0) + int(number)


def main() -> int:
    begin = time.monotonic()
    suite = Suite(sys.argv[1:])
    for files in groups():
        suite.queue.put(files)
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    workers = [threading.Thread(target=suite.work) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = ", ".join(f"{count} {outcome}" for outcome, count in suite.counts.items())
    print(f"pytest: {found} in {time.monotonic() - begin:.0f} s, {processes} processes")
    return 1 if suite.failed else 0


if __name__ == "__main__":
    sys.exit(main())
