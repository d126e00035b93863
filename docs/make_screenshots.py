"""Draw the pictures of docs/explore.md: the page of `hflow-emoji` in a headless Chromium.

python docs/make_screenshots.py docs/images/explore
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from playwright.sync_api import Page, sync_playwright

from hflow_rt.assets import demo_images

BEGIN = "#seed=1&image=3"


def photo(folder: Path) -> Path:
    """A held-out emoji."""
    with ZipFile(demo_images()) as images:
        name = sorted(name for name in images.namelist() if name.startswith("test/"))[60]
        return Path(images.extract(name, folder))


def whole(page: Page, path: Path) -> None:
    """The page once nothing is drawn any more."""
    page.wait_for_selector("#grid[data-drawn]")
    page.wait_for_timeout(500)
    page.screenshot(path=path, full_page=True)


def main(folder: Path) -> None:
    """Write light.png, dark.png and phone.png."""
    folder.mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "hflow_rt.cli", "explore", "hflow-emoji", "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    address = server.stdout.readline().split()[-1]
    try:
        with sync_playwright() as driver, tempfile.TemporaryDirectory() as files:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
            page.goto(address + BEGIN)
            page.wait_for_selector("body[data-ready]")
            page.locator("#file").set_input_files(photo(Path(files)))
            page.wait_for_url("**picture=*")
            page.get_by_role("button", name="where it acts: z2").click()
            page.wait_for_selector("#heat-box:not([hidden])")
            whole(page, folder / "light.png")
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
            page.goto(f"{address}{BEGIN}&panel=between&other=11&share=0.5&mode=slerp&space=y0")
            whole(page, folder / "dark.png")
            page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
            page.goto(f"{address}{BEGIN}&panel=mix&other=4&levels=3")
            page.wait_for_selector("#grid[data-drawn]")
            page.locator("#picture-title").scroll_into_view_if_needed()
            page.evaluate("document.querySelector('#picture-title').scrollIntoView()")
            page.wait_for_timeout(500)
            page.screenshot(path=folder / "phone.png")
            browser.close()
    finally:
        server.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
