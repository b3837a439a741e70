"""A picture of a report, drawn by Chromium: ``python -m simulations.screenshot REPORT PNG``.

``docs/report.png`` is that of ``make demo``: ``python -m simulations.screenshot
outputs/demo/report.html docs/report.png``.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from flwr_colearn import ColearnError

NAMES = ("chromium", "chromium-browser", "google-chrome")
COLOURS = 128
"""A chart has few colours, and a picture with a palette of them has a third of the bytes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a picture; return 2 if that is impossible."""
    parser = argparse.ArgumentParser(prog="python -m simulations.screenshot", description=__doc__)
    parser.add_argument("report", type=Path, help="the HTML file")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("--width", type=int, default=1180, help="pixels (default 1180)")
    parser.add_argument("--height", type=int, default=1020, help="pixels (default 1020)")
    parser.add_argument("--dark", action="store_true", help="in the dark mode")
    options = parser.parse_args(arguments)
    try:
        shoot(options.report, options.picture, (options.width, options.height), options.dark)
    except ColearnError as error:
        print(f"screenshot: {error}", file=sys.stderr)
        return 2
    return 0


def browser() -> str | None:
    """Return the path of an installed Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def shoot(report: Path, picture: Path, size: tuple[int, int], dark: bool = False) -> None:
    """Draw the top of a report, `size` pixels wide and high.

    Raises
    ------
    ColearnError
        If Chromium is not installed, or the report is not there.
    """
    program = browser()
    if program is None:
        raise ColearnError(f"expected one of {', '.join(NAMES)} to be installed, found none")
    if not report.is_file():
        raise ColearnError(f"expected a report, found no file {report}; make demo writes one")
    with TemporaryDirectory() as folder:
        raw = Path(folder, "raw.png")
        flags = [f"--screenshot={raw}", f"--window-size={size[0]},{size[1]}"]
        flags += [f"--user-data-dir={folder}/profile", *(["--force-dark-mode"] if dark else [])]
        common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        url = report.absolute().as_uri()
        subprocess.run(
            [program, *common, *flags, url], check=True, timeout=120, capture_output=True
        )
        _reduce(raw, picture)


def _reduce(raw: Path, picture: Path) -> None:
    from PIL import Image  # which matplotlib needs too

    with Image.open(raw) as image:
        image.convert("RGB").quantize(COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
