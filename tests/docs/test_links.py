"""The README: its length, its links, and the tests and files that the pages name.

Links between pages are those of the site, which is not built with one that leads nowhere.
"""

import re

import pytest

from tests.docs.blocks import FENCE, PAGES, ROOT

README = ROOT / "README.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_the_links_of_the_readme_lead_somewhere():
    links = LINK.findall(README.read_text())
    assert len(links) > 30
    gone = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert gone == []


def test_every_page_is_linked_from_the_readme_or_the_home_page():
    homes = README.read_text() + (ROOT / "docs" / "index.md").read_text()
    linked = {link.rpartition("/")[2] for link in LINK.findall(homes)}
    costs = (ROOT / "docs" / "costs.md").read_text()
    linked |= set(LINK.findall(costs))
    assert {path.name for path in PAGES} - {"README.md", "index.md"} <= linked


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_tests_that_a_page_names_exist(path):
    text = FENCE.sub("", path.read_text())
    for name, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / name).exists(), name
        assert not test or f"\ndef {test}(" in (ROOT / name).read_text(), test


def test_the_tests_of_the_tables_of_faults_exist():
    tables = (ROOT / "docs" / "faults.md").read_text().partition("## What was tried")[2]
    named = re.findall(r"`([\w/]*\btest_\w+\.py)`", tables)
    assert len(named) > 40
    roots = (ROOT, ROOT / "tests" / "flwr_colearn")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_files_that_a_page_names_exist(path):
    for name in re.findall(
        r"`((?:simulations|clients|flwr_colearn)/[\w./-]*\w)`", path.read_text()
    ):
        assert (ROOT / name).exists(), name


def test_bytes_of_federated_averaging_are_never_named_without_its_t():
    for path in (README, ROOT / "docs" / "index.md"):
        for sentence in re.split(r"(?<=[.!?])\s|\n\n", path.read_text()):
            if "federated averaging" in sentence and re.search(r"\bbytes|MB\b", sentence):
                named = set(re.findall(r"T=\d+", sentence))
                assert "T=1" in named, sentence
                assert len(named) > 1, sentence
