"""What MkDocs makes of this folder beside its pages: the tutorial, tables of settings, help texts.

The tutorial is the notebook ``tutorial.ipynb``. In a page, ``<!-- settings: MODULE.CLASS -->`` is
replaced by the table of a class of settings, and ``<!-- help: COMMAND -->`` by what it prints.
"""

import dataclasses
import inspect
import io
import json
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

MODULES = {"flwr-colearn": "flwr_colearn.reporting.command_line"}
"""The modules of commands that are not ``python -m MODULE``."""


def on_startup(**_: Any) -> None:
    """Let the settings be those of this repository's packages."""
    if str(ROOT) not in sys.path:  # MkDocs takes back what a hook does while it is imported
        sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebook as a page; the notebook itself stays beside it."""
    notebook = json.loads((Path(config.docs_dir) / "tutorial.ipynb").read_text())
    files.append(File.generated(config, "tutorial.md", content=as_page(notebook)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page, and link to the tutorial's page in place of its file."""
    markdown = re.sub(r"<!-- settings: (\S+) -->", lambda m: settings_table(m[1]), markdown)
    markdown = re.sub(r"<!-- help: (.+?) -->", lambda m: help_section(m[1]), markdown)
    return markdown.replace("](tutorial.ipynb)", "](tutorial.md)")


def as_page(notebook: dict[str, Any]) -> str:
    """Return a notebook as Markdown, without outputs."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + "\n"


def settings_table(path: str) -> str:
    """Return the table of a dataclass of settings: key, default, meaning."""
    module, _, name = path.rpartition(".")
    settings = getattr(import_module(module), name)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for names, text in attributes_of(settings):
        # The docstring speaks of fields, the reader of keys.
        text = re.sub(
            r"`(\w+)`",
            lambda name: name[0].replace("_", "-") if name[1] in defaults else name[0],
            text,
        )
        for each in names:
            default = json.dumps(defaults[each])
            rows.append(f"| `{each.replace('_', '-')}` | `{default}` | {text} |")
    return "\n".join(rows)


def attributes_of(settings: type) -> list[tuple[list[str], str]]:
    """Return (names, meaning) for each entry of the docstring's section of attributes."""
    section = inspect.getdoc(settings).partition("Attributes\n----------\n")[2]  # type: ignore[union-attr]
    entries = re.findall(r"^(\S.*)\n((?:    .*\n?)+)", section, re.M)
    return [
        (re.split(r",\s*", head.partition(" : ")[0]), " ".join(text.split()))
        for head, text in entries
    ]


def help_section(command: str) -> str:
    """Return a heading with the command's help text."""
    module, words = parts_of(command.split())
    main = import_module(module).main
    printed = io.StringIO()
    with (
        redirect_stdout(printed),
        patch.object(sys, "argv", [command, *words, "--help"]),
        patch.dict(os.environ, COLUMNS="100"),
        suppress(SystemExit),  # so argparse ends after --help
    ):
        main()
    return f"## {command}\n\n```text\n{printed.getvalue().strip()}\n```\n"


def parts_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the module of a command, and its arguments."""
    if words[:2] == ["python", "-m"]:
        module = words[2]
        if (ROOT / Path(*module.split("."))).is_dir():
            module += ".__main__"
        return module, words[3:]
    return MODULES[words[0]], words[1:]
