"""A headless Chromium for the tests of the page, and for pictures of it.

    python tests/report_browser.py RUN/report.html NAME docs/assets

writes NAME-light.png, NAME-dark.png, NAME-phone.png and NAME-print.png: the first screen each.
"""

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
HOW_TO_INSTALL = "no Chromium on this machine; install it with: apt-get install chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PRINTED_WIDTH = 703
"""Pixels of CSS between the margins of A4."""
SCREENS = {
    "light": (1280, 900, "light"),
    "dark": (1280, 900, "dark"),
    "phone": (390, 844, "light"),
    "print": (PRINTED_WIDTH, 1025, "light"),
}
COLOURS, MARGIN = 128, 45


@contextmanager
def opened(
    page_file: Path, *, width: int = 1280, height: int = 900, color_scheme: str = "light"
) -> Iterator[tuple[Page, list[str]]]:
    """The page, and what it complained about so far: console errors, exceptions, requests."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if color_scheme == "dark" else "light",
        )
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda r: (
                complaints.append(r.url) if not r.url.startswith(("file:", "data:")) else None
            ),
        )
        page.goto(page_file.resolve().as_uri())
        yield page, complaints
        context.close()
        browser.close()


def take_pictures(page_file: Path, name: str, directory: Path) -> list[Path]:
    """Its first screen in light, in dark, on a phone and on paper, as small files."""
    made = []
    for kind, (width, height, scheme) in SCREENS.items():
        with opened(page_file, width=width, height=height, color_scheme=scheme) as (page, _):
            page.emulate_media(media="print" if kind == "print" else "screen")
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        if kind == "print":
            picture = ImageOps.expand(picture, MARGIN, "white")
        made.append(directory / f"{name}-{kind}.png")
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(made[-1], optimize=True)
    return made


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
