"""The page in a real browser: every panel, links, undo, pictures, and a server that goes away."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explore_page import IN_BROWSER, Open, Photo, alone, python_of, shown
from explore_server import running
from PIL import Image

from hflow_rt.runtime import load
from hflow_rt.runtime.explore.studio import Studio
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.files import load_latents
from hflow_rt.runtime.session import Session

pytestmark = IN_BROWSER


def test_samples_and_sliders(visit: Open, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit("#seed=4")
    page.wait_for_selector("#grid[data-drawn]")
    assert page.locator("#grid button").count() == 8
    np.testing.assert_array_equal(shown(page), alone(session, 0, 4))
    page.get_by_label("sample 5 of seed 4").click()
    np.testing.assert_array_equal(shown(page), alone(session, 5, 4))
    page.get_by_label("std of z0").fill("0.9")
    page.get_by_label("std of z0").dispatch_event("change")
    stds = dict.fromkeys(session.input_shapes, 0.7) | {"z0": 0.9}
    np.testing.assert_array_equal(shown(page), alone(session, 5, 4, std=stds))
    np.testing.assert_array_equal(python_of(page, session, tmp_path, monkeypatch), shown(page))
    wanted = "--seed 4 --first 5 -n 1 --std end0=0.7 --std end1=0.7 --std z1=0.7 --std z0=0.9 -o"
    assert wanted in page.text_content("#command")
    page.get_by_role("button", name="redraw z1").click()
    page.get_by_role("button", name="zero end1").click()
    np.testing.assert_array_equal(python_of(page, session, tmp_path, monkeypatch), shown(page))
    assert page.get_by_role("button", name="zero end1").get_attribute("aria-pressed") == "true"


def test_back_forward_links_and_a_second_tab(visit: Open) -> None:
    page = visit()
    first = shown(page)
    assert page.get_by_role("button", name="Undo").is_disabled()
    page.keyboard.press("Control+z")  # which does not leave the page
    page.get_by_label("sample 3 of seed 0").click()
    third = shown(page)
    page.get_by_role("button", name="zero z1").click()
    zeroed = shown(page)
    link = page.url.partition("/#")[2]
    page.get_by_role("button", name="Undo").click()
    page.wait_for_url("**/#image=3&*")
    np.testing.assert_array_equal(shown(page), third)
    page.keyboard.press("Control+z")
    page.wait_for_selector("#grid button.is-this[aria-label^='sample 0 ']")
    np.testing.assert_array_equal(shown(page), first)
    page.keyboard.press("Control+Shift+z")
    page.keyboard.press("Control+Shift+z")
    page.wait_for_url("**zeroed=z1")
    np.testing.assert_array_equal(shown(page), zeroed)
    np.testing.assert_array_equal(shown(visit(f"#{link}")), zeroed)
    assert page.url.endswith(link)  # which the other tab left alone


def test_between_mix_and_heat(visit: Open, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit("#image=2&other=7")
    page.get_by_role("tab", name="Between").click()
    page.get_by_label("From the picture to the other one").fill("0.3")
    page.get_by_label("From the picture to the other one").dispatch_event("change")
    page.get_by_label("Way").select_option("slerp")
    page.get_by_label("Space").select_option("y0")
    np.testing.assert_array_equal(python_of(page, session, tmp_path, monkeypatch), shown(page))
    with page.expect_download() as waited:
        page.get_by_role("button", name="GIF").click()
    with Image.open(waited.value.path()) as gif:
        assert (gif.format, gif.size, gif.n_frames) == ("GIF", (256, 256), 46)
    page.get_by_role("tab", name="Mix").click()
    assert page.text_content("#levels-said") == "end0, end1 of the other one"
    page.get_by_label("Coarse levels from the other one").fill("3")
    page.get_by_label("Coarse levels from the other one").dispatch_event("change")
    np.testing.assert_array_equal(python_of(page, session, tmp_path, monkeypatch), shown(page))
    page.get_by_role("tab", name="Change").click()
    page.get_by_role("button", name="where it acts: z1").click()
    page.wait_for_selector("#heat-box:not([hidden])")
    assert len(np.unique(shown(page, "#heat").reshape(-1, 3), axis=0)) > 20


def test_a_picture_of_ones_own(visit: Open, session: Session, photo: Photo, tmp_path: Path) -> None:
    page, mine = visit(), photo("mine.png", 6)
    page.locator("#file").set_input_files(mine)
    page.wait_for_url("**picture=*")
    original = to_uint8(session.read(mine))[0]
    np.testing.assert_array_equal(shown(page), original)
    np.testing.assert_array_equal(shown(page, "#original"), original)
    bits = float(session.bits_per_dim(session.inverse(session.read(mine)).log_prob)[0])
    caption = f"your picture: every 8-bit value comes back; {bits:.3f} bits/dim (plug-in estimate)"
    assert page.text_content("#picture-said") == caption
    for button, name in (("PNG", "picture.png"), ("Latents file", "picture.safetensors")):
        with page.expect_download() as waited:
            page.get_by_role("button", name=button, exact=True).click()
        assert waited.value.suggested_filename == name
        waited.value.save_as(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")), original)
    page.get_by_role("button", name="Undo").click()
    page.wait_for_selector("#original-box", state="hidden")
    np.testing.assert_array_equal(shown(page), alone(session, 0))


def test_a_dropped_and_a_broken_picture(visit: Open, photo: Photo, tmp_path: Path) -> None:
    page = visit()
    data = photo("dropped.png", 7).read_bytes()
    drop = """([target, bytes, name]) => {
      const given = new DataTransfer();
      given.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
      document.querySelector(target).dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true }));
    }"""
    page.evaluate(drop, ["#stage", list(data), "dropped.png"])
    page.wait_for_url("**picture=*")
    page.evaluate(drop, ["#stage", list(data[:100]), "broken.png"])
    page.wait_for_selector("#banner:not([hidden])")
    assert page.text_content("#banner").startswith("broken.png is not a whole image of a known kind")
    page.locator("#grid button").nth(1).click()
    page.wait_for_selector("#banner", state="hidden")


def test_an_attribute(
    visit: Open, session: Session, photo: Photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit()
    page.get_by_role("tab", name="Attribute").click()
    page.locator("#with").set_input_files([photo("a.png", 1), photo("b.png", 2)])
    page.get_by_text("2 pictures with it, 0 without it").wait_for()
    page.locator("#without").set_input_files([photo("c.png", 3), photo("d.png", 4)])
    page.get_by_text("2 pictures with it, 2 without it").wait_for()
    page.get_by_role("button", name="What sets them apart").click()
    page.wait_for_url("**attribute=*")
    assert "stds apart" in page.text_content("#attribute-said")
    page.get_by_label("How much of it to add").fill("-0.5")
    page.get_by_label("How much of it to add").dispatch_event("change")
    with page.expect_download() as waited:
        page.get_by_role("button", name="Save the attribute").click()
    waited.value.save_as(tmp_path / "attribute.safetensors")
    np.testing.assert_array_equal(python_of(page, session, tmp_path, monkeypatch), shown(page))


def test_over_time_controls_and_steps(visit: Open, many_steps: Path, photo: Photo, tmp_path: Path) -> None:
    session = load(many_steps, device="cpu")
    with running(session) as port:
        page = visit("#panel=time&image=2", port)
        np.testing.assert_array_equal(shown(page), alone(session, 2))
        page.get_by_label("From the start to the picture").fill("0")
        page.get_by_text("after 1 of 4 steps").wait_for()
        page.get_by_label("From the start to the picture").dispatch_event("change")
        page.wait_for_url("**frame=0*")
        first = next(session.trajectory(next(session.draw([2]))))
        np.testing.assert_array_equal(shown(page), to_uint8(first)[0])
        made = (
            page.text_content("#python").replace("MODEL", str(many_steps)).replace("picture.png", f"{tmp_path}/one.png")
        )
        exec(made, {})
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one.png").convert("RGB")), shown(page))
        page.get_by_role("tab", name="Change").click()
        page.get_by_label("steps").fill("2")
        page.get_by_label("steps").dispatch_event("change")
        np.testing.assert_array_equal(shown(page), alone(session.in_steps(2), 2))
        assert "hflow-rt sample MODEL --seed 0 --first 2 -n 1 --steps 2" in page.text_content("#command")
        mine = photo("eight.png", 6, 8)
        page.locator("#file").set_input_files(mine)
        page.wait_for_url("**picture=*")
        original = to_uint8(session.read(mine))[0]
        np.testing.assert_array_equal(shown(page), original)
        page.get_by_label("steps").fill("3")  # of which it has other latents
        page.get_by_label("steps").dispatch_event("change")
        np.testing.assert_array_equal(shown(page), original)


def test_an_address_of_nonsense(visit: Open, session: Session) -> None:
    page = visit(
        "#seed=abc&image=-5&share=9&mode=x&levels=99&panel=evil&std.z0=1e99&steps=7&gain=1e9&redrawn.z1=1.5&a=b"
    )
    assert page.evaluate("location.hash") == "#share=1&levels=4&gain=3&count=8&std.z0=1.5"
    stds = dict.fromkeys(session.input_shapes, 0.7) | {"z0": 1.5}
    np.testing.assert_array_equal(shown(page), alone(session, 0, std=stds))


def test_a_way_that_plays_and_is_stopped(visit: Open) -> None:
    page = visit("#panel=between&share=0")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_url("**share=0.*")
    share = page.get_by_label("From the picture to the other one").input_value()
    assert f"share={share}" in page.url
    page.get_by_role("button", name="Play").click()
    page.get_by_role("tab", name="Mix").click()
    page.wait_for_timeout(300)
    assert "panel=mix" in page.url
    assert page.locator("#play").text_content() == "Play"


def test_a_server_that_goes_away(visit: Open, session: Session, photo: Photo) -> None:
    with running(session) as port:
        page = visit("", port)
        page.locator("#file").set_input_files(photo("kept.png", 8))
        page.wait_for_url("**picture=*")
        before = shown(page)
    page.get_by_role("button", name="zero z0").click()
    page.get_by_text("The server does not answer. This page goes on when it does.").wait_for()
    with running(session, port):
        page.wait_for_selector("#banner", state="hidden")
        page.get_by_role("button", name="zero z0").click()
        np.testing.assert_array_equal(shown(page), before)  # it was given again


def test_a_picture_is_searched_for(
    visit: Open, slotted: Session, photo: Photo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By pixels alone; the second search is given up, and while it goes on there is no third."""
    likeness = lambda features, targets: lambda images: (images - targets).square().flatten(1).sum(1)  # noqa: E731
    monkeypatch.setattr("hflow_rt.projection.projecting.unlikeness", likeness)
    go = threading.Event()
    go.set()
    project = Studio.project

    def slow(self: Studio, *given: Any) -> Any:
        data, name, label, _, controls, told, wanted = given

        def heard(line: Any) -> None:
            told(line)
            if line["step"] == 3:
                go.wait(20)

        return project(self, data, name, label, 20, controls, heard, wanted)

    monkeypatch.setattr(Studio, "project", slow)
    with running(slotted) as port:
        page = visit("", port)
        page.locator("#file").set_input_files(photo("goal.png", 6))
        page.wait_for_url("**picture=*")
        found = shown(page)
        assert page.text_content("#picture-said").startswith("your picture: differs by up to ")
        with page.expect_download() as waited:
            page.get_by_role("button", name="Latents file").click()
        waited.value.save_as(tmp_path / "picture.safetensors")
        values, about = load_latents(tmp_path / "picture.safetensors")
        np.testing.assert_array_equal(to_uint8(slotted.decode(about["space"], values))[0], found)
        monkeypatch.chdir(tmp_path)
        exec(page.text_content("#python").replace("MODEL", str(slotted.bundle.path)), {})
        np.testing.assert_array_equal(np.asarray(Image.open("picture.png").convert("RGB")), found)
        page.get_by_role("tab", name="Mix").click()
        shown(page)
        assert page.locator("#banner").is_hidden()
        go.clear()
        page.locator("#file").set_input_files(photo("other.png", 7))
        page.get_by_text("searching: 3 of 20").wait_for()
        page.locator("#file").set_input_files(photo("third.png", 8))
        page.get_by_text("A search is going on: wait for it, or give it up.").wait_for()
        page.get_by_role("button", name="Give up").click()
        page.wait_for_selector("#search", state="hidden")
        go.set()
        assert "picture=" in page.url


def test_by_keyboard_on_a_phone_in_the_dark(visit: Open) -> None:
    page = visit(viewport={"width": 360, "height": 740}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#grid button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url("**/#image=2&*")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+Enter")
    page.wait_for_url("**other=0*")
    page.locator("#tab-change").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**panel=between*")
    unnamed = """() => [...document.querySelectorAll("button, input, select, canvas")]
      .filter((one) => one.checkVisibility())
      .filter((one) => !one.textContent && !one.labels?.length && !one.getAttribute("aria-label"))
      .filter((one) => !one.closest("button"))
      .map((one) => one.outerHTML)"""
    assert page.evaluate(unnamed) == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 29)"
