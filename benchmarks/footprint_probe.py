"""One process of :mod:`benchmarks.footprint`: runs what it is told and writes down what it has become on the way.

    python benchmarks/footprint_probe.py FILE imports|generate|run [options of the command ...]

A command is stopped at for a moment before its model is loaded, when it is connected, and when its text is there: where
:func:`tsqp.cli_parts.split_model` begins, yields and ends. Imports nothing but what it measures.
"""

import json
import os
import sys
import time

BEGIN = time.perf_counter()
del sys.path[0]  # this folder: its modules are no part of what is measured
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.spawn", "os.system")
stages = {}
children = []
files = set()


def count(event, values):
    if event in STARTS:
        children.append(event)
    elif event == "open" and isinstance(values[0], str) and values[0].startswith("/"):
        files.add(values[0])


def stage(name):
    """What this process is now. Bytes are of the whole mappings: an enclave has to hold and measure them."""
    mapped, code = set(), 0
    with open("/proc/self/maps") as file:
        for line in file:
            words = line.split(maxsplit=5)
            if len(words) == 6 and words[5].startswith("/") and not words[5].startswith(("/dev/", "/memfd")):
                mapped.add(words[5].rstrip())
                if "x" in words[1]:
                    begin, end = (int(part, 16) for part in words[0].split("-"))
                    code += end - begin
    with open("/proc/self/smaps_rollup") as file:
        rollup = dict(line.split(":", 1) for line in file if ":" in line and "kB" in line)
    modules = [name for name, module in sys.modules.items() if module is not None]
    stages[name] = {
        "seconds": time.perf_counter() - BEGIN,
        "modules": len(modules),
        "tsqp_modules": sum(name.partition(".")[0] == "tsqp" for name in modules),
        "rss_bytes": int(rollup["Rss"].split()[0]) * 1024,
        "pss_bytes": int(rollup["Pss"].split()[0]) * 1024,
        "threads": len(os.listdir("/proc/self/task")),
        "mapped_files": len(mapped),
        "code_bytes": code,
        "opened_files": len(files),
        "children": len(children),
    }


def run_imports():
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer  # noqa: F401

    stage("loaded")


def run_command(name, options):
    from contextlib import contextmanager

    from tsqp import cli_parts

    real = cli_parts.split_model

    @contextmanager
    def watched(*values, **more):
        stage("begun")
        with real(*values, **more) as model:
            stage("loaded")
            yield model
            stage("answered")

    cli_parts.split_model = watched
    sys.argv[1:] = [name, *options]
    from tsqp.__main__ import main

    main()


if __name__ == "__main__":
    report, way, *words = sys.argv[1:]
    sys.addaudithook(count)
    try:
        if way == "imports":
            run_imports()
        else:
            run_command(way, words)
    finally:
        with open(report, "w") as file:
            json.dump(stages, file)
