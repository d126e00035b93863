"""The page in a real browser without a server: the model runs in it."""

import http.server
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explore_page import IN_BROWSER, Open, Photo, alone, python_of, shown
from PIL import Image

from hflow_rt.errors import BackendUnavailable
from hflow_rt.runtime import load
from hflow_rt.runtime.explore.static import find_runtime, write_static
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.attributes import load_attribute
from hflow_rt.runtime.latents.files import load_latents
from hflow_rt.runtime.latents.latent_views import slots_mixed, space_of_slots, way_in, zeroed
from hflow_rt.runtime.session import Session

pytestmark = IN_BROWSER
Static = Callable[[Path], int]


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], int]]:
    """The folder of a bundle for any web host, on one."""
    try:
        find_runtime(None)
    except BackendUnavailable as error:
        pytest.skip(str(error))

    class Host(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *about: object) -> None:
            pass

    hosts = []

    def host(bundle: Path) -> int:
        folder = tmp_path_factory.mktemp("static") / "site"
        write_static(bundle, folder)
        hosts.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Host, directory=folder)))
        threading.Thread(target=hosts[-1].serve_forever, daemon=True).start()
        return int(hosts[-1].server_address[1])

    yield host
    for one in hosts:
        one.shutdown()
        one.server_close()


def close(found: Any, expected: Any) -> None:
    """Within one 8-bit level."""
    assert found.shape == expected.shape
    assert abs(found.astype(int) - expected).max() <= 1


def test_without_a_server(
    visit: Open, static: Static, session: Session, photo: Photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit("#seed=4&image=5", static(session.bundle.path))
    close(shown(page), alone(session, 5, 4))
    page.get_by_role("button", name="redraw z1").click()
    close(shown(page), python_of(page, session, tmp_path, monkeypatch))
    page.get_by_role("tab", name="Between").click()
    page.get_by_label("Way").select_option("slerp")
    page.get_by_label("Space").select_option("y0")
    close(shown(page), python_of(page, session, tmp_path, monkeypatch))
    with page.expect_download() as waited:
        page.get_by_role("button", name="GIF").click()
    with Image.open(waited.value.path()) as gif:
        assert (gif.format, gif.size, gif.n_frames) == ("GIF", (256, 256), 46)
        first = np.asarray(gif.convert("RGB"))[::16, ::16].astype(int)
    assert abs(first - alone(session, 5, 4, redrawn={"z1": 1000})).mean() < 4  # of 256 colours
    page.get_by_role("tab", name="Mix").click()
    close(shown(page), python_of(page, session, tmp_path, monkeypatch))
    page.get_by_role("tab", name="Change").click()
    page.get_by_role("button", name="where it acts: z1").click()
    page.wait_for_selector("#heat-box:not([hidden])")
    mine = photo("mine.png", 6)
    page.locator("#file").set_input_files(mine)
    page.wait_for_url("**picture=*")
    close(shown(page), to_uint8(session.read(mine))[0])
    close(shown(page, "#original"), to_uint8(session.read(mine))[0])
    bits = float(session.bits_per_dim(session.inverse(session.read(mine)).log_prob)[0])
    said = page.text_content("#picture-said")
    assert "every 8-bit value comes back" in said
    assert abs(float(said.split("; ")[1].split()[0]) - bits) < 0.05  # of pixels that differ by one here and there
    page.get_by_role("tab", name="Attribute").click()
    for side, seeds in (("#with", (1, 2)), ("#without", (3, 4))):
        page.locator(side).set_input_files([photo(f"{seed}.png", seed) for seed in seeds])
        page.get_by_text("2 pictures with it, 2" if side == "#without" else "2 pictures with it, 0").wait_for()
    page.get_by_role("button", name="What sets them apart").click()
    page.wait_for_url("**attribute=*")
    with page.expect_download() as waited:
        page.get_by_role("button", name="Save the attribute").click()
    waited.value.save_as(tmp_path / "attribute.safetensors")
    page.evaluate("history.back()")
    page.get_by_label("sample 5 of seed 4").click()
    page.evaluate("history.forward()")
    with page.expect_download() as waited:
        page.get_by_role("button", name="Latents file").click()
    waited.value.save_as(tmp_path / "picture.safetensors")
    assert load_attribute(tmp_path / "attribute.safetensors").about.positives == 2
    _, about = load_latents(tmp_path / "picture.safetensors")
    assert about["model"] == session.manifest.checkpoint["sha256"]
    page.locator("#file").set_input_files({"name": "no.png", "mimeType": "image/png", "buffer": b"no image"})
    page.get_by_text("no.png is not a whole image").wait_for()


def test_many_steps_without_a_server(visit: Open, static: Static, many_steps: Path, photo: Photo) -> None:
    session = load(many_steps, device="cpu")
    page = visit("#image=2&seed=3", static(many_steps))
    close(shown(page), alone(session, 2, 3))
    page.get_by_role("button", name="zero start", exact=True).click()
    latents = dict(next(session.draw([2], seed=3)))
    latents["start"] = zeroed(session, "start", latents["start"])
    close(shown(page), to_uint8(session.forward(latents))[0])
    page.get_by_role("button", name="As it was").click()
    page.get_by_label("steps").fill("2")
    page.get_by_label("steps").dispatch_event("change")
    close(shown(page), alone(session.in_steps(2), 2, 3))
    page.get_by_role("tab", name="Over time").click()
    page.get_by_text("after 2 of 2 steps").wait_for()
    page.get_by_label("From the start to the picture").fill("0")
    page.get_by_text("after 1 of 2 steps").wait_for()
    frame = next(session.in_steps(2).trajectory(next(session.in_steps(2).draw([2], seed=3))))
    close(shown(page), to_uint8(frame)[0])
    page.get_by_role("tab", name="Change").click()
    page.locator("#file").set_input_files(photo("eight.png", 6, 8))
    page.wait_for_url("**picture=*")
    close(shown(page), to_uint8(session.read(photo("eight.png", 6, 8)))[0])


def test_layers_without_a_server(visit: Open, static: Static, slotted: Session) -> None:
    page = visit("#panel=mix&image=2&other=4&levels=2", static(slotted.bundle.path))
    space = space_of_slots(slotted)
    assert space is not None
    base, other = (slotted.into_space(space, next(slotted.draw([image]))) for image in (2, 4))
    close(shown(page), to_uint8(slotted.decode(space, slots_mixed(slotted, space, other, base, [0, 1])))[0])
    page.get_by_role("tab", name="Between").click()
    page.get_by_label("Space").select_option(space)
    half = way_in(slotted, space, "lerp")(base, other, 0.5)
    close(shown(page), to_uint8(slotted.decode(space, half))[0])
    page.get_by_role("tab", name="Change").click()
    page.get_by_label("psi").fill("0.5")
    page.get_by_label("psi").dispatch_event("change")
    close(shown(page), alone(slotted.with_controls({"psi": 0.5}), 2))
    assert page.get_by_role("button", name="Open a picture").is_disabled()


def test_without_the_web_runtime(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="npm install onnxruntime-web"):
        write_static(tmp_path, tmp_path / "site", tmp_path)
