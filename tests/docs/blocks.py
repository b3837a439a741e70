"""The fenced blocks of the README and of the pages, and the commands in their text."""

import re
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.M | re.S)
COMMENT = re.compile(r"(^|\s)#.*$", re.M)
HEREDOC = re.compile(r"<<(\w+)([^\n]*)\n(.*?)^\1$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int
    heading: str
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(path):
    """Return the fenced blocks of a page."""
    page = path.read_text()
    return [
        Block(
            path.relative_to(ROOT).as_posix(),
            page.count("\n", 0, found.start()) + 1,
            heading_before(page, found.start()),
            found[2],
            dedent(found[3]),
        )
        for found in FENCE.finditer(page)
    ]


def heading_before(page, position):
    prose = FENCE.sub(lambda found: " " * len(found[0]), page[:position])
    return ["", *re.findall(r"^#+ (.*)$", prose, re.M)][-1]


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def of_language(language):
    return [block for block in BLOCKS if block.language == language]


def inline_commands():
    """Return (page, command) for every command that the text of a page has between backticks."""
    programs = r"(\.venv/bin/)?python -m|(flwr|flwr-colearn|make) [a-z.]|pip install"
    found = []
    for path in PAGES:
        text = FENCE.sub("", path.read_text())
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
            command = " ".join(code.split())
            # "NAME" and the like stand for something that the reader chooses.
            if re.match(programs, command) and not re.search(r"\b[A-Z]{3,}\b(?!=)|<", command):
                found.append((path.name, command))
    return found


def documents_in(script):
    """Return the texts that a script writes to files (``<<END``)."""
    return [text for _, _, text in HEREDOC.findall(script)]
