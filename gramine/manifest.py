"""Renders a manifest template: with gramine-manifest, or, for ``make check``, without Gramine.

Run by the Python that is to run in the enclave. Options are environment variables, which the Makefile sets and
describes; what they leave open is found out here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import inventory
from inventory import INSIDE, LIBRARIES, SITE, InventoryError, checked

MODEL, KEYS, TRUSTED = f"{INSIDE}/model", f"{INSIDE}/keys", f"{INSIDE}/trusted"
_MIB = 1 << 20
#: Private memory of a runner before it has weights: its libraries, which are copied into the enclave, are 430 MiB and
#: its heap and stacks 310 MiB with torch 2.13 and transformers 5.23; rounded up.
BASE_MIB = 1024
#: And half as much again, as memory gets fragmented.
MARGIN = 1.5
#: Main thread, ZeroMQ's two, Gramine's three (IPC, async, TLS), and six for what starts now and then.
OTHER_THREADS = 12


def definitions(kind: str, options: Mapping[str, str]) -> dict[str, str]:
    """The templates' variables, all of them strings, for ``runner`` or ``local``. Raises :class:`InventoryError`."""
    threads = _number("THREADS", options["THREADS"])
    values = _files(kind, options) | {
        "argv": toml_list(arguments(kind, options)),
        "threads": str(threads),
        "max_threads": options["MAX_THREADS"] or str(2 * threads + OTHER_THREADS),
        "log_level": checked(options["LOG_LEVEL"]),
        "ra_type": checked(options["RA_TYPE"]),
        "sgx": _flag("SGX", options),
        "edmm": _flag("EDMM", options),
        "debug": _flag("DEBUG", options),
    }
    places = inventory.packages(inventory.distributions("tsqp"))
    directory = Path(options["MODEL"] or places["tsqp"] / "demo").absolute()
    model = inventory.model_files(directory, weights=kind == "local")
    values |= {
        "model_inside": MODEL,
        "model_directory": checked(directory),
        "model": inventory.mounts(model, MODEL),
        "model_key_name": checked(options["MODEL_KEY_NAME"]),
        "enclave_size": options["ENCLAVE_SIZE"] or enclave_size(inventory.total_bytes(model), options),
    }
    return values | _machine()


@cache
def _machine() -> dict[str, str]:
    """What is the same for every manifest made here."""
    places = inventory.packages(inventory.distributions("tsqp"))
    return inventory.python() | {
        "libraries": inventory.mounts(inventory.libraries(places), LIBRARIES),
        "packages": inventory.mounts(places, SITE),
        "packages_trusted": inventory.lines(inventory.trusted_of(places)),
        "library_path": f"{LIBRARIES}:/lib",
        "site": SITE,
        "python_home": inventory.PYTHON_HOME,
    }


def toml_list(words: list[str]) -> str:
    """As an array of TOML, which writes strings as JSON does but for surrogates and DEL."""
    return json.dumps(words, ensure_ascii=False).replace("\x7f", "\\u007f")


def _files(kind: str, options: Mapping[str, str]) -> dict[str, str]:
    """Files that are there only if they were asked for; an empty string is none."""
    values = {"prompt_file": _file("PROMPT_FILE", options), "secret_key_name": checked(options["SECRET_KEY_NAME"])}
    values["prompt_inside"] = f"{KEYS}/prompt"
    if kind == "runner":
        shm = options["SHM_NAME"]
        if not shm.startswith("tsqp"):
            raise InventoryError(f"SHM_NAME={shm!r} does not start with tsqp; give what TSQP_SHM_NAME is at the server")
        values |= {
            "shm": f"/dev/shm/{checked(shm)}",
            "shm_outside": checked(Path(options["SHM_DIR"]) / shm),
            "curve_key": _file("CURVE_KEY", options),
            "curve_key_inside": f"{KEYS}/runner",
            "curve_server": _file("CURVE_SERVER", options),
            "curve_server_inside": f"{TRUSTED}/server",
            "trusted_weights": _file("TRUSTED_WEIGHTS", options),
            "trusted_weights_inside": f"{TRUSTED}/weights",
        }
    secret = values["prompt_file"] or values.get("curve_key")
    if _flag("SGX", options) == "true" and secret and not values["secret_key_name"]:
        raise InventoryError(
            f"{secret} would be readable by the host as a trusted file; encrypt it, and give the key's name in "
            "SECRET_KEY_NAME"
        )
    return values


def arguments(kind: str, options: Mapping[str, str]) -> list[str]:
    """The command's arguments, from the interpreter's name on. They are measured, and the host can read them."""
    module = options["MODULE"]
    command = ["python3", "-S", "-m", module, *(["generate"] if module == "tsqp" else [])]
    if options["PROMPT_FILE"]:
        command += ["--prompt-file", f"{KEYS}/prompt"]
    elif options["PROMPT"]:
        command += ["--prompt", options["PROMPT"]]
    command += ["--model", MODEL, "--placement", "local" if kind == "local" else options["PLACEMENT"]]
    command += ["--threads", options["THREADS"], "--max-new-tokens", options["MAX_NEW_TOKENS"]]
    if kind == "runner":
        command += ["--endpoint", options["ENDPOINT"]]
        if bool(options["TRUSTED_WEIGHTS"]) != bool(options["TRUSTED_DIGEST"]):
            raise InventoryError("TRUSTED_WEIGHTS and TRUSTED_DIGEST belong together; give both, as tsqp trust says")
        if options["TRUSTED_WEIGHTS"]:
            command += ["--trusted-weights", f"{TRUSTED}/weights", "--trusted-digest", options["TRUSTED_DIGEST"]]
    return command + options["ARGS"].split()


def enclave_size(model_bytes: int, options: Mapping[str, str]) -> str:
    """Base, the model's files twice (as read, and as tensors) and what is computed with, and the margin; then the next
    power of two, which SGX wants."""
    mib = (BASE_MIB + 2 * model_bytes / _MIB + _number("WORK_MIB", options["WORK_MIB"])) * MARGIN
    size = 1 << (int(mib) - 1).bit_length()
    return f"{size}M" if size < 1024 else f"{size // 1024}G"


def _file(name: str, options: Mapping[str, str]) -> str:
    """The option's file, which has to exist; or nothing."""
    if options[name] and not Path(options[name]).is_file():
        raise InventoryError(f"{name}={options[name]} is no file; give one, or leave it empty")
    return checked(Path(options[name]).resolve()) if options[name] else ""


def _flag(name: str, options: Mapping[str, str]) -> str:
    if options[name] not in ("0", "1", ""):
        raise InventoryError(f"{name}={options[name]} is neither 0 nor 1")
    return "true" if options[name] == "1" else "false"


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise InventoryError(f"{name}={text} is not a positive whole number")
    return int(text)


def render(template: Path, output: Path, values: Mapping[str, str]) -> None:
    """With gramine-manifest, which also checks it against Gramine's own schema."""
    tool = shutil.which("gramine-manifest")
    if tool is None:
        raise InventoryError("gramine-manifest is missing: install Gramine 1.8 or newer; make check works without it")
    subprocess.run(
        [tool, *(f"-D{name}={value}" for name, value in values.items()), str(template), str(output)], check=True
    )


def make(template: Path, directory: Path, check_only: bool) -> None:
    """Writes ``NAME.manifest`` of ``NAME.manifest.template`` into ``directory``, or ``NAME.manifest.checked``. Raises
    :class:`InventoryError`; CalledProcessError where gramine-manifest said what is wrong."""
    kind = template.name.partition(".")[0]
    if check_only:
        import check

        text = check.checked_text(template.read_text(), definitions(kind, os.environ))
        (directory / f"{kind}.manifest.checked").write_text(text)
        print(f"{directory / kind}.manifest.checked: every key is known to Gramine 1.8 and 1.9")
    elif inventory.is_editable(inventory.distributions("tsqp")["tsqp"]):
        raise InventoryError("tsqp is installed editable, with its files in several places; pip install it as a wheel")
    else:
        render(template, directory / f"{kind}.manifest", definitions(kind, os.environ))


def main() -> int:
    """The command; 0, or the status to leave with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("templates", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(), help="directory of what is written")
    parser.add_argument("--check", action="store_true", help="render without Gramine, and check every key")
    given = parser.parse_args()
    for template in given.templates:
        try:
            make(template, given.out, given.check)
        except KeyError as error:
            print(f"the option {error} is not set; run make, which sets it", file=sys.stderr)
            return 1
        except (InventoryError, OSError) as error:
            print(f"{template.name}: {error}", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError as error:
            return error.returncode or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
