"""The report in a real browser, Chromium, where one is installed: width, colours, hostile texts."""

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from flwr_colearn import RoundRecord
from flwr_colearn.reporting import Run, save_report
from simulations import screenshot

DOCS = Path(screenshot.__file__).resolve().parents[1] / "docs"

CHROMIUM = screenshot.browser()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium"),
]

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
# The page has no script, so one around it measures it.
FRAME = """<iframe id="frame" src="report.html" style="width:{width}px;border:0"></iframe>
<pre id="found"></pre>
<script>
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const line = page.querySelector('svg.chart path[style*="--s0"]');
  found.textContent = [root.scrollWidth <= root.clientWidth, page.title, page.scripts.length,
    getComputedStyle(page.body).backgroundColor, getComputedStyle(line).stroke,
    line.getBBox().width > 0].join("|");
}};
</script>
"""


def record(number):
    who = HOSTILE if number == 1 else "a-name-without-any-space-" * 12
    return RoundRecord(
        number,
        2,
        0.1,
        2 * number,
        relative_change=0.5 / number,
        participants=[who],
        refusals=[{"participant": who, "reason": who}],
        server_metrics={"accuracy": 0.25 * number, who: 1.0},
        site_metrics={who: {"accuracy": 0.5}},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = Run(HOSTILE, [record(1), record(2)], configuration={HOSTILE: HOSTILE})
    save_report([run], folder / "report.html", "Title")
    return folder


def measured(folder, width, *flags):
    (folder / "frame.html").write_text(FRAME.format(width=width))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *flags]
    done = subprocess.run(
        [*command, "--dump-dom", (folder / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1].split("|")


@pytest.mark.parametrize("width", [320, 390, 900, 1280])
def test_the_page_fits_every_screen_and_hostile_texts_do_nothing(width, folder):
    fits, title, scripts, paper, line, drawn = measured(folder, width)
    assert (fits, title, scripts, drawn) == ("true", "Title", "0", "true")
    assert (paper, line) == ("rgb(255, 255, 255)", "rgb(11, 99, 176)")


def test_the_dark_mode_has_its_own_colours(folder):
    _, _, _, paper, line, _ = measured(folder, 390, "--force-dark-mode")
    assert (paper, line) == ("rgb(20, 23, 26)", "rgb(99, 179, 247)")


def test_the_picture_of_the_docs_is_a_small_one_of_a_report(folder, tmp_path):
    picture = tmp_path / "report.png"
    assert screenshot.main([str(folder / "report.html"), str(picture), "--height", "700"]) == 0
    with Image.open(picture) as image, Image.open(DOCS / "report.png") as documented:
        assert image.size == (1180, 700)
        paper = image.convert("RGB").getpixel((2, 2))
        assert min(paper) >= 250  # light
        assert documented.size[0] == 1180
        assert min(documented.convert("RGB").getpixel((2, 2))) >= 250
    assert (DOCS / "report.png").stat().st_size < 200_000


def test_without_a_report_the_error_says_where_one_comes_from(tmp_path, capsys):
    assert screenshot.main([str(tmp_path / "none.html"), str(tmp_path / "a.png")]) == 2
    assert "make demo writes one" in capsys.readouterr().err
