"""Draws ``docs/static/serving.png``, the page of the server with the two models of the quickstart.

    python examples/quickstart.py --output FOLDER
    python -m tests.support.page_picture FOLDER

Fonts are those of the machine; Debian's ``fonts-inter`` and ``fonts-sil-charis`` are what the picture was drawn with.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from PIL import Image

from flair_peft.serving import create_app
from tests.support.browser import Page, chromium
from tests.support.http_server import address_of

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "static" / "serving.png"
WIDTH, SCALE, COLOURS = 1180, 1.5, 64


def draw(folder: Path) -> bytes:
    """Return the picture, after the example has run with and without the adapters."""
    app = create_app({name: folder / f"{name}.pt" for name in ("ner", "sentiment")})
    with address_of(app) as address, chromium() as driver:
        page = Page(driver, f"{address}/")
        page.resize(WIDTH, 900)
        page.one("#compare").click()
        for _ in range(2):  # the first answer takes longer than all others
            page.one("#example").click()
            page.wait(lambda: page.all(".group"))
            page.wait_for_answer()
        page.script("document.activeElement.blur()")
        height = page.script("return document.getElementById('answers').getBoundingClientRect().bottom") + 16
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": SCALE}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    app.state.service.close()
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    PICTURE.write_bytes(draw(Path(sys.argv[1])))
