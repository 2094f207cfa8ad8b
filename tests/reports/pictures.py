"""Pictures of the pages for docs/images: ``make pictures``, on a machine with Chromium."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import Browser
from tests.reports.made_pages import make_pages

PLACE = Path(__file__).parents[2] / "docs" / "images"
PAGES = {"diagnose": "diagnose", "verify": "verify", "statistics": "inspect", "run": "run"}
"""Names of pages, and of their pictures."""
SCREENS = {"phone": (390, 844), "wide": (1180, 1180)}


def main() -> None:
    """Write the pictures, with few colours, so that they stay small."""
    with tempfile.TemporaryDirectory() as place, Browser(Path(place) / "profile") as browser:
        (Path(place) / "pages").mkdir()
        pages = make_pages(Path(place) / "pages", hostile=False)
        for page, name in PAGES.items():
            for screen, (width, height) in SCREENS.items():
                for scheme in ("light", "dark"):
                    browser.open(pages[page], width=width, height=height, dark=scheme == "dark")
                    picture = PLACE / f"{name}-{screen}-{scheme}.png"
                    browser.picture(picture)
                    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    main()
