"""A server of a tiny model, pictures to give it, and a browser to look at it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hflow_rt.runtime import load
from hflow_rt.runtime.session import Session

sys.path.insert(0, str(Path(__file__).parent))  # what tests share is found by name
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def session(tiny_run: Path) -> Session:
    return load(tiny_run, device="cpu")


@pytest.fixture(scope="session")
def slotted(slots_run: Path) -> Session:
    """A model of one latent without an inverse, whose layers have values of their own."""
    return load(slots_run, device="cpu")


@pytest.fixture(scope="session")
def port(session: Session) -> Iterator[int]:
    from explore_server import running

    with running(session) as found:
        yield found


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A picture of its own name and seed, larger than the model's."""
    folder = tmp_path_factory.mktemp("photos")

    def make(name: str, seed: int = 0, side: int = 100) -> Path:
        corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
        Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
        return folder / name

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from explore_page import CHROMIUM

    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield made
        made.close()


@pytest.fixture
def visit(browser: Any, port: int) -> Iterator[Callable[..., Any]]:
    """Open an address; what a page says is wrong with it, and whatever it asks of others, fails the test."""
    wrong: list[str] = []
    contexts = []

    def open_page(address: str = "", at: int = port, **settings: Any) -> Any:
        context = browser.new_context(accept_downloads=True, **settings)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        own = f"http://127.0.0.1:{at}/"
        # each change draws the samples again, so a few must do
        address = address if "count=" in address else f"{address or '#'}&count=8".replace("#&", "#")
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith((own, "blob:")) else wrong.append(asked.url))
        page.goto(own + address)
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
