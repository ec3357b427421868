"""Imports of a runner: what is left out, and that everything is as ever afterwards. Each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

from commands import environment


def printed(code: str) -> list[str]:
    """What a program printed, by line."""
    command = [sys.executable, "-c", dedent(code)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_of_it_stays_behind() -> None:
    lines = printed(
        """
        import sys
        from tsqp.lean import NEEDLESS, lean_imports
        with lean_imports():
            import torch
            from transformers import LlamaForCausalLM
            print(any(name in sys.modules and sys.modules[name] is not None for name in NEEDLESS))
            print([name for name in ("torch._inductor", "sympy", "torch.distributed.tensor") if name in sys.modules])
        print([name for name, module in sys.modules.items() if module is None])
        print(torch.distributed.is_available(), torch.compiler.disable.__module__)
        import rich, torch._dynamo
        print(torch._dynamo.__file__.endswith("_dynamo/__init__.py"), torch._dynamo is sys.modules["torch._dynamo"])
        """
    )
    assert lines[:3] == ["False", "[]", "[]"]
    assert lines[3].endswith(" torch.compiler")
    assert lines[4:] == ["True True"]


def test_whoever_asks_for_the_compiler_inside_gets_it() -> None:
    lines = printed(
        """
        import sys
        from tsqp.lean import lean_imports
        with lean_imports():
            import torch
            marked = torch.compiler.disable(recursive=False)(len)
            print(marked is len, "torch._dynamo.eval_frame" in sys.modules)
            print(torch._dynamo.config.cache_size_limit > 0, "torch._dynamo.eval_frame" in sys.modules)
        print(torch._dynamo.config.cache_size_limit > 0)
        """
    )
    assert lines == ["True False", "True True", "True"]


def test_a_process_with_transformers_is_left_alone() -> None:
    lines = printed(
        """
        import sys, torch, transformers
        before, disable = dict(sys.modules), torch.compiler.disable
        from tsqp.lean import lean_imports
        with lean_imports():
            print(torch.compiler.disable is disable, sorted(set(sys.modules) - set(before)))
        """
    )
    assert lines == ["True ['tsqp', 'tsqp.lean']"]
