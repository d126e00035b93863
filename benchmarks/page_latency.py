"""How long the page of `hflow-rt explore` takes from a slider's movement to the picture, in a headless Chromium.

python benchmarks/page_latency.py [MODEL] [--static]: milliseconds, median and 95 % of 60 movements of the first std or
control, one after the other, and of a drag in which they come every 16 ms.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

MOVE = """async ([count, pause]) => {
  const slider = document.querySelector("#latents input[type=range], #controls input[type=range]");
  const picture = document.querySelector("#picture");
  const times = [];
  for (let move = 0; move < count; move++) {
    const shown = new Promise((done) => {
      const seen = new MutationObserver(() => {
        if (!picture.dataset.shows) return; // it is asked for
        seen.disconnect();
        requestAnimationFrame(done);
      });
      seen.observe(picture, { attributeFilter: ["data-shows"] });
    });
    slider.value = Number(slider.min) + ((move % 20) + 1) * (slider.max - slider.min) / 25;
    const began = performance.now();
    slider.dispatchEvent(new Event("input"));
    if (pause) await new Promise((done) => setTimeout(done, pause));
    if (!pause || move === count - 1) await shown;
    times.push(performance.now() - began);
  }
  return times;
}"""


def measured(page: Page) -> str:
    """One line."""
    page.wait_for_selector("body[data-ready]")
    page.wait_for_selector("#grid[data-drawn]", timeout=120_000)
    alone = np.array(page.evaluate(MOVE, [60, 0])[5:])
    page.wait_for_selector("#grid[data-drawn]", timeout=120_000)
    dragged = page.evaluate(MOVE, [60, 16])[-1]
    return (
        f"a movement {np.median(alone):.0f} ms ({np.quantile(alone, 0.95):.0f} at 95 %), "
        f"end of a drag to its picture {dragged:.0f} ms"
    )


def main(words: list[str]) -> None:
    """Serve the model, or write and serve its static folder, and measure."""
    static = "--static" in words
    model = [word for word in words if word != "--static"]
    run = [sys.executable, "-m", "hflow_rt.cli", "explore", *model]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        if static:
            site = Path(folder) / "site"
            subprocess.run([*run, "--static", str(site)], check=True, stdout=subprocess.DEVNULL)
            host = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(site), "8766"]
            server = subprocess.Popen(host, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        else:
            server = subprocess.Popen([*run, "--no-browser"], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        line = server.stdout.readline()
        try:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto("http://127.0.0.1:8766/" if static else line.split()[-1])
            print(measured(page))
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main(sys.argv[1:])
