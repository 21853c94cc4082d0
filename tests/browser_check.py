"""Drive the page in a headless Chromium: draw, ask, force a token, download; desktop and phone, light and dark.

    python tests/browser_check.py [OUT_DIR]     # needs playwright and a Chromium; not part of the suite

Screenshots go to OUT_DIR, out_page by default.
"""

import io
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import rle_decode
from metrics import iou
from page import open_server

VIEWS = {"desktop": ({"width": 1280, "height": 900}, "light"), "phone": ({"width": 360, "height": 740}, "dark")}


def drive(page, name, out):
    """The whole tour in one view; AssertionError where the page does not do what it should."""
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.wait_for_selector("#checkpoint option", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name}: wider than the screen"

    page.click("#clear")  # a red circle in the middle, and a blue square beside it
    box = page.locator("#picture").bounding_box()
    for shape, color, x, y, far in (("circle", "red", 0.35, 0.4, 0.2), ("square", "blue", 0.75, 0.75, 0.15)):
        page.click(f"#shapes [title={shape}]")
        page.click(f"#colors [title={color}]")
        page.locator("#picture").scroll_into_view_if_needed()
        box = page.locator("#picture").bounding_box()
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + (x + far) * box["width"], box["y"] + y * box["height"], steps=3)
        page.mouse.up()
    page.fill("#prompt", "the red circle")
    begun = time.perf_counter()
    page.press("#prompt", "Enter")
    page.wait_for_selector(".cell.alone, .cell.draft")
    first = time.perf_counter() - begun
    page.locator("#said", has_text="sure that it is there").wait_for()

    def download(button):
        with page.expect_download() as download:
            page.click(button)
        return Path(download.value.path()).read_bytes()

    mask = np.asarray(Image.open(io.BytesIO(download("#get-mask")))).astype(bool)
    y, x = np.mgrid[:384, :384] + 0.5
    drawn = np.hypot(x - 0.35 * 384, y - 0.4 * 384) < 0.2 * 384
    assert mask.shape == (384, 384) and iou(mask, drawn) >= 0.8, f"{name}: IoU {iou(mask, drawn)}"
    assert np.array_equal(rle_decode(json.loads(download("#get-rle"))), mask)
    assert Image.open(io.BytesIO(download("#get-overlay"))).size == (384, 384)

    cell = page.locator(".cell").nth(27)  # by keyboard: the one beside the first, then far into the circle
    page.locator("#grids .cell").first.focus()
    for key in ["ArrowDown"] * 3 + ["ArrowRight"] * 3:
        page.keyboard.press(key)
    assert cell.evaluate("cell => cell === document.activeElement")
    page.wait_for_selector("#others button:not([disabled])")
    page.screenshot(path=out / f"{name}.png", full_page=True)
    before = cell.get_attribute("aria-label")
    choice = page.locator("#others button:not([disabled])").first
    token = choice.get_attribute("aria-label").split()[2].rstrip(",")
    choice.click()
    page.locator("#said", has_text="sure that it is there").wait_for()
    after = cell.get_attribute("aria-label")
    assert before != after and f"token {token}," in after and "changed" in after, f"{name}: {before} -> {after}"

    page.fill("#prompt", "the blue square")  # a second layer, then slowly again
    page.uncheck("#draft")
    page.click("#ask")
    page.locator("#said", has_text="sure that it is there").wait_for()
    assert page.locator("#layers li").count() == 2
    page.click("#replay")
    page.wait_for_timeout(1500)
    page.screenshot(path=out / f"{name}-replay.png", full_page=True)
    page.locator("#picture").focus()  # a dot of the keyboard ends the masks
    for key in ("ArrowUp", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    assert page.locator("#layers li").count() == 0
    assert not problems, f"{name}: {problems}"
    print(f"{name}: first token after {1000 * first:.0f} ms, IoU {iou(mask, drawn):.3f}, forced {token}: {after}")


def main():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("error: this needs playwright and a browser: pip install playwright && playwright install chromium")
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out_page")
    out.mkdir(parents=True, exist_ok=True)
    server = open_server(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for name, (size, scheme) in VIEWS.items():
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(f"http://localhost:{server.server_port}/")
            drive(page, name, out)
        browser.close()


if __name__ == "__main__":
    main()
