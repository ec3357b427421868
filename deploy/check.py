"""Does without Docker what the images and their compose file do: every step, then both ends, then the end.

    python deploy/check.py [--torch torch==2.13.0]

Builds the wheel, installs it, and runs the commands of the two Dockerfiles with their environment and nothing else of
this one's, each without a network and as the images' user where this user may arrange it: server, health check, runner.
Leaves with status 1 and a sentence where something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
TREE = DEPLOY.parent
READY_S, RUN_S, STOP_S = 120.0, 120.0, 15.0
PROMPT = "And the king said"


@dataclass
class Image:
    """What a Dockerfile says of the container: the last stage's, as Docker would understand it."""

    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    user: str = ""
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction of a Dockerfile and its arguments, on one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        name, _, rest = line.partition(" ")
        yield name.upper(), rest.strip()


def read_image(dockerfile: Path) -> Image:
    """The :class:`Image` of a Dockerfile."""
    image = Image()
    for name, rest in instructions(dockerfile.read_text()):
        if name == "FROM":
            image = Image(steps=image.steps)
        elif name == "ARG":
            image.arguments.update(pair.split("=", 1) for pair in rest.split() if "=" in pair)
        elif name == "ENV":
            image.environment.update(pair.split("=", 1) for pair in rest.split())
        elif name == "USER":
            image.user = string.Template(rest).substitute(image.arguments)
        elif name == "RUN":
            image.steps += [step.strip() for step in rest.split("&&")]
        elif name == "HEALTHCHECK" and "CMD" in rest:
            image.health = json.loads(rest.partition("CMD")[2])
        elif name in ("ENTRYPOINT", "CMD"):
            setattr(image, {"ENTRYPOINT": "entrypoint", "CMD": "command"}[name], json.loads(rest))
    return image


class Host:
    """A place on this machine that stands for the two containers' file systems."""

    def __init__(self, place: Path) -> None:
        self.place, self.prefix = place, place / "opt"
        self.socket = place / "run"
        # A directory of the root user's own can't be entered by the images' user.
        self.may_change_user = os.geteuid() == 0 and _readable_by_all(Path(sys.executable).resolve())
        self.may_leave_network = shutil.which("unshare") is not None and _works(["unshare", "--net", "true"])

    def command(self, image: Image, words: list[str]) -> list[str]:
        """``words`` as the container would run them."""
        settings = {name: value.replace("${PATH}", os.defpath) for name, value in image.environment.items()}
        settings["PATH"] = settings["PATH"].replace("/opt/tsqp", str(self.prefix))
        settings["HOME"] = str(self.place / "home")
        words = [word.replace("/run/tsqp", str(self.socket)) for word in words]
        network = ["unshare", "--net"] if self.may_leave_network else []
        user = image.user.partition(":")[0]
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if self.may_change_user else []
        return [*network, *become, "env", "-i", *(f"{name}={value}" for name, value in settings.items()), *words]


def _readable_by_all(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.parents)


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def build(host: Host, torch: str, server: Image) -> None:
    """The steps of the images."""
    steps, wheels = DEPLOY / "steps", host.place / "wheels"
    settings = {**os.environ, "TORCH": torch, "PYTHON": sys.executable}
    for step in ([steps / "build-wheel.sh", TREE, wheels], [steps / "install.sh", wheels, host.prefix, "metrics"]):
        subprocess.run(step, env=settings, check=True)
    user = server.user.partition(":")[0] if host.may_change_user else str(os.geteuid())
    for directory in (host.socket, host.place / "home"):
        subprocess.run([steps / "directories.sh", user, directory], check=True)


@contextmanager
def serving(host: Host, image: Image) -> Iterator[subprocess.Popen[str]]:
    """The server's container, healthy by its own health check; nothing of it is left afterwards."""
    process = subprocess.Popen(host.command(image, [*image.entrypoint, *image.command]), text=True)
    try:
        deadline = time.monotonic() + READY_S
        while not _works(host.command(image, image.health)):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode} before it was healthy")
            if time.monotonic() > deadline:
                raise SystemExit(f"the server was not healthy after {READY_S:.0f} s")
            time.sleep(1.0)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def segments() -> set[str]:
    """The segments of servers on this machine, also of others than ours."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("tsqp")}


def run(host: Host, server: Image, runner: Image) -> None:
    """Both containers: a prompt on the runner's standard input, its text on the standard output, SIGTERM."""
    before = segments()
    with serving(host, server) as process:
        words = host.command(runner, [*runner.entrypoint, *runner.command])
        done = subprocess.run(words, input=PROMPT, capture_output=True, text=True, timeout=RUN_S, check=False)
        if done.returncode or len(done.stdout.strip()) <= len(PROMPT):
            raise SystemExit(f"the runner ended with status {done.returncode}: {done.stdout!r} {done.stderr!r}")
        process.send_signal(signal.SIGTERM)
        if process.wait(STOP_S) != 0:
            raise SystemExit(f"the server ended with status {process.returncode} on SIGTERM, not with 0")
    left = [*host.socket.iterdir(), *(segments() - before)]
    if left:
        raise SystemExit(f"left behind: {', '.join(map(str, left))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", default="torch", help="what pip installs as torch")
    server, runner = read_image(DEPLOY / "server.Dockerfile"), read_image(DEPLOY / "runner.Dockerfile")
    torch = parser.parse_args().torch
    with tempfile.TemporaryDirectory(prefix="tsqp-deploy-") as folder:
        os.chmod(folder, 0o755)
        host = Host(Path(folder))
        if not host.may_change_user:
            print("SKIPPED: running as the images' user (this user may not become it, or it may not read Python)")
        if not host.may_leave_network:
            print("SKIPPED: running without a network (unshare --net is not allowed)")
        build(host, torch, server)
        run(host, server, runner)
    print("server and runner did what their images and the compose file have them do")


if __name__ == "__main__":
    main()
