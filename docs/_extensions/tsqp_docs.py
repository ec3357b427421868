"""What the site needs beyond Sphinx: options of the commands as typer has them, and short names in docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer.main
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective

from tsqp.cli import app as commands

#: Modules whose public names docstrings use without their module.
_MODULES = ("client", "channel", "errors", "fused_requests", "listener", "model_info", "ops", "pending", "placement")
_MODULES += ("protocol", "submitting", "telemetry", "tracing", "perf_read", "analyze")
#: A line of a section that names one thing and says something of it.
_ITEM = re.compile(r"\s+[\w.]+( \([^)]*\))?: ")


def _table(rows: list[tuple[nodes.Node, nodes.Node]]) -> nodes.table:
    table = nodes.table(classes=["options"])
    group = nodes.tgroup(cols=2)
    table += group
    for width in (34, 66):
        group += nodes.colspec(colwidth=width)
    body = nodes.tbody()
    group += body
    for cells in rows:
        row = nodes.row()
        for cell in cells:
            row += nodes.entry("", nodes.paragraph("", "", cell))
        body += row
    return table


def _option(parameter: Any) -> tuple[nodes.Node, nodes.Node]:
    names = [*parameter.opts, *parameter.secondary_opts]
    text = " / ".join(names)
    if not parameter.is_flag:
        text += f" {parameter.metavar or parameter.type.name.upper()}"
    said = parameter.help or ""
    if parameter.required:
        said += " Required."
    elif parameter.show_default and parameter.default not in (None, False):
        shown = names[0].lstrip("-") if parameter.is_flag else parameter.default
        said += f" Default: {shown}."
    return nodes.literal(text, text), nodes.Text(said)


def _command(command: Any) -> tuple[nodes.Node, nodes.Node]:
    said = (command.help or "").partition("\n\n")[0]
    return nodes.literal(command.name, command.name), nodes.Text(" ".join(said.split()))


class CommandOptions(SphinxDirective):
    """``{command-options} NAME``: the options of one command, or its own commands, read from the program itself."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        group: Any = typer.main.get_command(commands)
        name = self.arguments[0]
        command = group if name == "tsqp" else group.commands.get(name)
        if command is None:
            raise self.error(f"tsqp has no command {name!r}")
        rows = [_option(parameter) for parameter in command.params if parameter.param_type_name == "option"]
        if name != "tsqp":
            rows += [_command(one) for one in getattr(command, "commands", {}).values()]
        return [_table(rows)]


def _full_names(target: str) -> Iterator[str]:
    """The documented names that a docstring may mean by a shorter one."""
    name = target.removeprefix("~").removeprefix(".").removeprefix("tsqp.")
    parts = name.split(".")
    if parts[0] in _MODULES and len(parts) > 1:  # tsqp.client.GPUClient is tsqp.GPUClient to its users
        parts = parts[1:]
    yield ".".join(["tsqp", *parts])
    for module in _MODULES:
        yield ".".join(["tsqp", module, *parts])


def resolve_short(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A ``missing-reference`` handler: tries the full names of a short one; None leaves it missing."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    for name in _full_names(node["reftarget"]):
        if name in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, contnode)
    return None


def _mark_programs(lines: list[str]) -> None:
    """An indented part of a module's docstring is program text, with or without two colons before it."""
    for number in range(len(lines) - 1, 1, -1):
        before, here = lines[number - 2 : number], lines[number]
        if here.startswith("    ") and not before[1] and before[0][:1].strip() and not before[0].endswith("::"):
            lines[number:number] = ["::", ""]


def read_sections(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turns ``Args:``, ``Returns:`` and ``Raises:`` into fields. A ``Raises:`` that only lists classes is a sentence.

    Not ``sphinx.ext.napoleon`` itself: that takes the first words of a property's docstring for its type.
    """
    for number, line in enumerate(lines[:-1]):
        if line.strip() == "Raises:" and not _ITEM.match(lines[number + 1]):
            rest = [text.strip() for text in lines[number + 1 :]]
            lines[number:] = ["", "Raises " + rest[0], *rest[1:]]
            break
    if what == "module":
        _mark_programs(lines)
    kind = "method" if what in ("property", "attribute", "data") else what
    config = Config(napoleon_use_rtype=False)
    lines[:] = GoogleDocstring(lines, config, app, kind, name, obj, options).lines()


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-options", CommandOptions)
    app.connect("autodoc-process-docstring", read_sections)
    app.connect("missing-reference", resolve_short)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
