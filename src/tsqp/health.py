"""Whether a server works, and not only answers: it is asked to compute something on its device."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from . import curve
from .client import GPUClient
from .config import parse_endpoint
from .errors import ConfigError, TsqpError, WaitTimeoutError


@dataclass(frozen=True)
class Health:
    """What was found at ``endpoint``; ``seconds`` is the round trip of the computation, ``error`` why there is none."""

    endpoint: str
    healthy: bool
    seconds: float | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.healthy and self.seconds is not None:
            return f"healthy: the server at {self.endpoint} computed and answered in {self.seconds * 1000:.2f} ms"
        return f"unhealthy: the server at {self.endpoint} does not work: {self.error}"


def check_health(
    endpoint: str,
    timeout: float,
    curve_key: curve.PathLike | None = None,
    curve_server: curve.PathLike | None = None,
) -> Health:
    """Connects to the server at ``endpoint`` and has it compute something small, in ``timeout`` seconds together.

    ``curve_key`` and ``curve_server`` are those of :func:`connect`. Whatever goes wrong is the answer, and not an
    exception; an endpoint that is malformed, or beyond this host without keys, raises :class:`EndpointError`, a timeout
    that is no positive number :class:`ConfigError`, a key file that can't be used :class:`KeyFileError`.
    """
    if not 0 < timeout < 1e6:
        raise ConfigError(f"timeout={timeout!r} is not a positive number of seconds; give one")
    curve.check_reach(parse_endpoint(endpoint), curve.client_keys(curve_key, curve_server))
    keys: dict[str, Any] = {"curve_key": curve_key, "curve_server": curve_server}
    begin = time.monotonic()
    try:
        with GPUClient(endpoint, timeout, connect_timeout=timeout, **keys) as client:
            client.timeout = max(0.0, begin + timeout - time.monotonic())
            return Health(endpoint, True, client.ping())
    except WaitTimeoutError:
        return Health(endpoint, False, error=f"it is connected, and computed nothing within {timeout:g} s")
    except (TsqpError, OSError) as error:
        return Health(endpoint, False, error=" ".join(str(error).split()) or type(error).__name__)
