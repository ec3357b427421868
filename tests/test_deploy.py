"""The images, the compose file and the systemd unit: that they say what tsqp needs, and what each other needs.

deploy/check.py runs their commands; hadolint, shellcheck and the compose schema look at their form (make lint).
"""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tsqp import cli, config

TREE = Path(__file__).parents[1]
DEPLOY = TREE / "deploy"
IMAGES = ("server", "runner")
UNIT = DEPLOY / "systemd" / "tsqp-server.service"
#: systemd's own scale: 0 is locked, 10 is open; up to here it says OK.
MOST_EXPOSED = 2.0


def load_check() -> Any:
    spec = importlib.util.spec_from_file_location("deploy_check", DEPLOY / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = load_check()


@pytest.fixture(params=IMAGES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def image(name: str) -> Any:
    return check.read_image(DEPLOY / f"{name}.Dockerfile")


def parse(words: list[str]) -> dict[str, Any]:
    """What the command line makes of a command; typer raises for an option it does not know."""
    assert words[0].rpartition("/")[2] == "tsqp"
    command = typer.main.get_command(cli.app).commands[words[1]]  # type: ignore[attr-defined]
    with command.make_context(words[1], list(words[2:])) as context:
        return context.params


def test_a_dockerfile_is_read_as_docker_reads_it(tmp_path):
    file = tmp_path / "Dockerfile"
    stages = "FROM a AS b\nENV OLD=1\n# RUN no\nFROM c\nARG UID=7\nENV A=1 \\\n    B=2\n"
    file.write_text(stages + 'RUN x \\\n    && y\nUSER ${UID}:${UID}\nCMD ["z"]\n')
    found = check.read_image(file)
    assert (found.environment, found.user, found.command) == ({"A": "1", "B": "2"}, "7:7", ["z"])
    assert found.steps == ["x", "y"]


def test_every_step_of_an_image_is_a_script_that_is_there(name):
    for step in image(name).steps:
        script = Path(re.sub(r"^(/source/deploy)?/steps", str(DEPLOY / "steps"), shlex.split(step)[0]))
        assert script.is_file()
        assert os.access(script, os.X_OK)


def test_an_image_copies_only_what_is_there(name):
    for instruction, rest in check.instructions((DEPLOY / f"{name}.Dockerfile").read_text()):
        if instruction == "COPY" and "--from" not in rest:
            assert all((TREE / source).exists() for source in rest.split()[:-1])


def test_the_commands_are_commands_of_tsqp(name, compose):
    found = image(name)
    arguments = parse([*found.entrypoint, *compose[name].get("command", found.command)])
    assert arguments["endpoint"] == "ipc:///run/tsqp/server.sock"


def test_health_is_a_real_computation_over_the_same_endpoint():
    found = image("server")
    assert found.health[:2] == ["tsqp", "health"]
    assert parse(found.health)["endpoint"] == parse(found.entrypoint)["endpoint"]


def test_both_ends_are_one_user_and_not_root(compose):
    users = {image(name).user for name in IMAGES} | {compose[name]["user"] for name in IMAGES}
    assert len(users) == 1
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users.pop())


def test_idle_threads_do_not_spin_and_no_hub_is_asked(name):
    assert image(name).environment["OMP_WAIT_POLICY"] == "passive"
    assert image(name).environment["HF_HUB_OFFLINE"] == "1"


def test_shared_memory_holds_the_rings_of_all_clients(compose):
    arguments = parse(["tsqp", "serve", *compose["server"]["command"]])
    needed = arguments["max_clients"] * 2 * config.MAX_CHUNKS * config.MAX_CHUNK_BYTES
    assert needed <= _bytes(compose["server"]["shm_size"]) < 2 * needed


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([kmg])b", text).groups()  # type: ignore[union-attr]
    return int(number) << {"k": 10, "m": 20, "g": 30}[unit]


def test_the_runner_joins_the_memory_and_the_socket_of_the_server(compose):
    server, runner = compose["server"], compose["runner"]
    assert server["ipc"] == "shareable"
    assert runner["ipc"] == "service:server"
    assert "socket:/run/tsqp" in server["volumes"]
    assert "socket:/run/tsqp" in runner["volumes"]


def test_neither_container_has_more_than_it_needs(name, compose):
    service = compose[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["network_mode"] == "none"
    assert not {"ports", "privileged", "cap_add", "pid", "devices"} & set(service)
    assert all(volume.endswith((":ro", "socket:/run/tsqp")) for volume in service["volumes"])


def test_the_prompt_is_no_argument_of_the_runner(compose):
    found = image("runner")
    assert "--prompt" not in [*found.entrypoint, *found.command, *compose["runner"].get("command", [])]
    assert compose["runner"]["stdin_open"] is True


def test_the_gpu_file_only_adds_to_the_server(compose):
    added = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]
    assert set(added) == {"server"}
    assert not set(added["server"]) & (set(compose["server"]) - {"environment"})


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser["Service"]


def test_the_unit_starts_the_server_where_its_directory_is():
    service = unit()
    path = config.parse_endpoint(parse(shlex.split(service["ExecStart"]))["endpoint"]).path
    assert path.startswith(f"/run/{service['RuntimeDirectory']}/")
    assert service["RuntimeDirectoryMode"] == "0700"


def test_the_unit_allows_what_the_server_needs():
    service = unit()
    assert "PrivateIPC" not in service  # the ring
    assert "MemoryDenyWriteExecute" not in service  # oneDNN's machine code
    assert "PrivateDevices" not in service  # the GPU
    assert "AF_UNIX" in service["RestrictAddressFamilies"].split()


@pytest.fixture
def installed_unit(tmp_path) -> Path:
    """The unit, as it would be where its command is installed."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "tsqp"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/tsqp/bin/tsqp", str(program)))
    return copy


def test_systemd_accepts_the_unit(installed_unit):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(installed_unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_finds_the_unit_locked(installed_unit):
    words = [
        "systemd-analyze",
        "security",
        "--offline=yes",
        f"--threshold={MOST_EXPOSED * 10:.0f}",
        str(installed_unit),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze can't judge a unit that is not installed")
    assert done.returncode == 0, done.stdout[-200:]
