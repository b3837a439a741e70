"""The site: it is built without a warning, needs no network, and its reference is complete."""

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import flwr_colearn
from clients.settings import ParticipantSettings
from simulations.settings import RunSettings

ROOT = Path(__file__).parents[2]


def build(folder, config=ROOT / "mkdocs.yml"):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    return folder, build(folder)


@pytest.fixture
def site(built):
    return built[0]


def test_it_is_built_without_a_warning(built):
    done = built[1]
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


@pytest.mark.parametrize(
    ("lines", "warnings"),
    [
        ("[gone](gone.md)\n\n[gone](results.md#gone)\n\n![gone](gone.png)", 3),
        ("::: flwr_colearn.Gone", 1),
    ],
    ids=["links", "reference"],
)
def test_what_is_not_there_ends_the_build(lines, warnings, tmp_path):
    for name in ("docs", "flwr_colearn", "clients", "simulations"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.json")
        )
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "limits.md").open("a") as page:
        page.write(f"\n{lines}\n")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert len(re.findall("^(WARNING|ERROR).*[Gg]one", done.stderr, re.M)) >= warnings


class Loaded(HTMLParser):
    """What a page makes the browser fetch."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe"):
            self.addresses.append(given.get("src"))
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.addresses.append(given.get("href"))


def test_a_reader_needs_no_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        for address in filter(None, loaded.addresses):
            assert not re.match(r"(\w+:)?//", address), (page.name, address)


def test_every_page_is_in_the_navigation(site):
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in home or page.stem == "index", page.name


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(page.read_text() for page in site.glob("reference*.html"))
    documented = set(re.findall(r'id="flwr_colearn\.(\w+)"', pages))
    assert set(flwr_colearn.__all__) - {"__version__"} <= documented


def test_a_docstring_is_shown_with_its_parameters(site):
    page = (site / "reference.html").read_text()
    assert 'id="flwr_colearn.CoLearn"' in page
    assert "<code>num_participants</code>" in page
    assert "Parameters" in page


@pytest.mark.parametrize("settings", [RunSettings, ParticipantSettings])
def test_every_key_of_the_run_config_is_in_its_table_with_its_default(settings, site):
    page = (site / "run-config.html").read_text()
    found = re.findall(r"<tr>\s*<td><code>([\w-]+)</code></td>\s*<td><code>(.*?)</code>", page)
    rows = {key: json.loads(unescape(default)) for key, default in found if default}
    assert rows.items() >= settings().to_config().items()


def test_the_commands_are_there_with_their_options(site):
    page = (site / "command-line.html").read_text()
    for words in ("usage: flwr-colearn report", "--epsilon EPSILON", "--variants VARIANT"):
        assert words in page


def test_the_tutorial_is_a_page(site):
    page = (site / "tutorial.html").read_text()
    assert "digits in ten minutes" in page
    assert "participant_mod" in page
