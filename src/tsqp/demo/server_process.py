"""A server in a child process, for the demo: started, waited for, and always stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..config import without_keys
from ..errors import ConnectError, TsqpError, WaitTimeoutError
from ..exits import signals_deferred

if TYPE_CHECKING:
    from ..client import GPUClient

_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_TRY_TIMEOUT_S = 1.0
_PAUSE_S = 0.05
#: A longer directory might not leave room for the socket's name in a socket address.
_MAX_DIRECTORY_BYTES = 70


class ServerProcess:
    """``tsqp serve`` on a checkpoint, listening on a socket in a private temporary directory.

    A context manager: entering starts the process (and does not wait), leaving stops it and removes the
    directory, whatever happened. The child is in this process's group: Ctrl-C at the terminal reaches it too.
    """

    def __init__(self, model: str, dtype: str = "float32", threads: int = 1) -> None:
        self._command = [sys.executable, "-m", "tsqp", "serve", "--model", model, "--device", "cpu"]
        self._command += ["--dtype", dtype, "--threads", str(threads)]
        self._directory = ""
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = ""

    def __enter__(self) -> ServerProcess:
        parent = tempfile.gettempdir()
        short = len(os.fsencode(parent)) <= _MAX_DIRECTORY_BYTES
        try:
            with signals_deferred():
                self._directory = tempfile.mkdtemp(prefix="tsqp-demo-", dir=parent if short else "/tmp")
                self.endpoint = f"ipc://{self._directory}/server.sock"
                self._process = self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> subprocess.Popen[bytes]:
        command = [*self._command, "--endpoint", self.endpoint]
        with self._log.open("wb") as log, without_keys():
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        return Path(self._directory) / "server.log"

    @property
    def output(self) -> str:
        """What the server has printed so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def connect(self, timeout: float = _READY_TIMEOUT_S) -> GPUClient:
        """A client of the server, as soon as it answers.

        Raises :class:`~tsqp.errors.TsqpError` with the server's last line where it ended instead, and
        :class:`~tsqp.errors.WaitTimeoutError` after ``timeout`` seconds.
        """
        from ..client import GPUClient

        assert self._process is not None
        deadline = time.monotonic() + timeout
        while True:
            code = self._process.poll()
            if code is not None:
                lines = self.output.strip().splitlines() or ["it printed nothing"]
                raise TsqpError(f"the server process ended with code {code} before it was ready: {lines[-1].strip()}")
            try:
                if os.path.exists(self.endpoint.removeprefix("ipc://")):
                    with without_keys():  # both ends are this user's own, in a private directory
                        return GPUClient(self.endpoint, connect_timeout=_TRY_TIMEOUT_S)
            except (ConnectError, WaitTimeoutError):
                pass  # bound but not answering yet; the deadline below ends this
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"the server process did not answer within {timeout:.0f} s; is the machine busy?"
                )
            time.sleep(_PAUSE_S)

    def stop(self) -> None:
        """Stops the process (SIGTERM, then SIGKILL) and removes its directory; may be called again."""
        with signals_deferred():  # bounded by the time-out below
            process, self._process = self._process, None
            directory, self._directory = self._directory, ""
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(_STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
