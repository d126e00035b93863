"""What the server answers, to whom, and what it refuses."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from explore_server import running

from hflow_rt.errors import BackendUnavailable
from hflow_rt.runtime import load
from hflow_rt.runtime.explore.server import hosts_of, listen
from hflow_rt.runtime.explore.studio import Studio
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.files import load_latents
from hflow_rt.runtime.session import Session

Photo = Callable[..., Path]


def ask(
    port: int, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if data is None else "POST"), path, data, headers or {})
    answer = connection.getresponse()
    found = answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return found


def sentence(answer: tuple[int, bytes, dict[str, str]]) -> str:
    return str(json.loads(answer[1])["error"])


def pixels(content: bytes) -> Any:
    return np.frombuffer(content, np.uint8).reshape(-1, 16, 16, 3)


def test_the_page_and_its_policy(port: int) -> None:
    for path, kind in (("/", "text/html"), ("/main.js", "javascript"), ("/style.css", "text/css")):
        status, content, headers = ask(port, path)
        assert status == 200
        assert kind in headers["content-type"]
        assert content
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
    page = ask(port, "/")[1].decode()
    assert "<script>" not in page
    assert "style=" not in page
    assert "http" not in page  # nothing from elsewhere


def test_nothing_beside_the_page_is_served(port: int) -> None:
    for path in (
        "/../server.py",
        "/%2e%2e/server.py",
        "/..%2fserver.py",
        "//etc/passwd",
        "/api/attributes/..%2f..%2fx",
    ):
        status, content, _ = ask(port, path)
        assert status in (404, 422), path
        assert b"import" not in content


def test_pictures_are_those_of_python(port: int, session: Session) -> None:
    recipes = [{"seed": 5, "image": image, "std": {"z0": 0.7}} for image in (2, 9)]
    status, content, _ = ask(port, "/api/images", {"recipes": recipes})
    assert status == 200
    expected = to_uint8(session.sample(10, seed=5, std={"z0": 0.7}))[[2, 9]]
    assert abs(pixels(content).astype(int) - expected).max() <= 1  # drawn in another batch
    alone = to_uint8(session.forward(next(session.draw([2], {"z0": 0.7}, 5))))
    np.testing.assert_array_equal(pixels(ask(port, "/api/images", {"recipes": recipes[:1]})[1]), alone)


def test_a_picture_comes_back(port: int, session: Session, photo: Photo, tmp_path: Path) -> None:
    path = photo("mine.png")
    status, content, _ = ask(port, "/api/pictures?how=%7B%22name%22%3A%22mine.png%22%7D", path.read_bytes())
    assert status == 200
    told = json.loads(content)
    original = to_uint8(session.read(path))
    np.testing.assert_array_equal(pixels(bytes.fromhex(told["original"])), original)
    recipes = [{"picture": told["picture"]}]
    np.testing.assert_array_equal(pixels(ask(port, "/api/images", {"recipes": recipes})[1]), original)
    encoded = session.inverse(session.read(path))
    assert told["bits_per_dim"] == pytest.approx(float(session.bits_per_dim(encoded.log_prob)[0]))
    (tmp_path / "mine.safetensors").write_bytes(ask(port, "/api/latents", {"recipes": recipes})[1])
    latents, about = load_latents(tmp_path / "mine.safetensors")
    np.testing.assert_array_equal(latents["z0"], encoded.latents["z0"])
    assert about["family"] == "hflow"


def test_a_picture_is_one_for_each_way_to_encode_it(many_steps: Path, photo: Photo) -> None:
    with running(load(many_steps, device="cpu")) as port:
        data = photo("eight.png", 3, 8).read_bytes()
        told = [
            json.loads(ask(port, "/api/pictures?how=" + quote(json.dumps(how)), data)[1])["picture"]
            for how in ({}, {"steps": 2}, {"controls": {"delta": 0.1}}, {})
        ]
        assert (len(set(told)), told[0]) == (3, told[3])


def test_a_search_that_fails_says_so(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("no such weights in /secret/place")

    monkeypatch.setattr(Studio, "project", fail)
    status, content, _ = ask(port, "/api/projections", b"picture")
    assert (status, json.loads(content)) == (
        200,
        {"error": "the model cannot be searched; the terminal of the server says why"},
    )
    assert "no such weights" in capfd.readouterr().err


def test_an_attribute(port: int, photo: Photo) -> None:
    def keep(seed: int) -> str:
        content = ask(port, "/api/pictures", photo(f"{seed}.png", seed).read_bytes())[1]
        return str(json.loads(content)["picture"])

    sets = {"with_it": [keep(1), keep(2)], "without": [keep(3), keep(4)]}
    told = json.loads(ask(port, "/api/attributes", sets)[1])
    assert told["apart"] > 0
    moved = {"recipes": [{"moved": {"attribute": told["attribute"], "gain": gain}} for gain in (0, 1)]}
    still, there = pixels(ask(port, "/api/images", moved)[1])
    assert abs(still.astype(int) - there).max() > 0
    assert ask(port, f"/api/attributes/{told['attribute']}")[0] == 200
    few = ask(port, "/api/attributes", {"with_it": [], "without": sets["without"]})
    assert (few[0], sentence(few)) == (
        422,
        "an attribute needs at least 2 images on each side; with it has 0; add some",
    )


def test_heat_maps_and_animations(port: int) -> None:
    status, content, headers = ask(port, "/api/heat", {"recipes": [{"seed": 1}], "latent": "z0"})
    assert status == 200
    assert len(content) == 3 * 16 * 16
    assert 0 < float(headers["x-largest"]) < 1
    way = [{"between": {"other": {"image": 1}, "share": share}} for share in (0, 0.5, 1)]
    status, content, headers = ask(port, "/api/animation", {"recipes": way})
    assert (status, headers["content-type"], content[:3]) == (200, "image/gif", b"GIF")


def test_a_model_of_many_steps(many_steps: Path) -> None:
    session = load(many_steps, device="cpu")
    with running(session) as port:
        model = json.loads(ask(port, "/model.json")[1])
        assert (model["steps"], model["fewer_steps"], model["said"]) == (4, True, "MODEL")
        assert [one["name"] for one in model["controls"]] == ["delta"]
        body = {"recipes": [{"seed": 2}], "controls": {"delta": 0.1}, "steps": 2}
        content = ask(port, "/api/trajectory", body)[1]
        chosen = session.in_steps(2).with_controls({"delta": 0.1})
        frames = [to_uint8(frame) for frame in chosen.trajectory(next(session.in_steps(2).draw([0], seed=2)))]
        assert content == b"".join(frame.tobytes() for frame in frames)
        heat = {"recipes": [{"seed": 2}], "latent": "noise"}
        assert len(ask(port, "/api/heat", heat)[1]) == 3 * 8 * 8
        mixed = {"recipes": [{"seed": 2, "mixed": {"other": {"image": 1}, "levels": ["noise"]}}]}
        one, other = (dict(next(session.draw([image], seed=seed))) for image, seed in ((0, 2), (1, 0)))
        expected = to_uint8(session.forward(one | {"noise": np.asarray(other["noise"])}))
        np.testing.assert_array_equal(
            np.frombuffer(ask(port, "/api/images", mixed)[1], np.uint8).reshape(expected.shape), expected
        )
        status, gif, _ = ask(port, "/api/animation", body | {"on_the_way": True})
        assert (status, gif[:3]) == (200, b"GIF")
        refused = ask(port, "/api/images", {"recipes": [{}], "steps": 5})
        assert "the number of steps must be at most 4" in sentence(refused)


@pytest.mark.parametrize(
    ("path", "body", "status", "line"),
    [
        ("/api/images", b"{", 400, "Invalid JSON"),
        ("/api/images", {"recipes": [{"std": {"z0": 1e39}}]}, 400, "less than or equal to 100"),
        ("/api/images", {}, 400, "recipes: Field required"),
        ("/api/images", {"recipes": []}, 400, "at least 1 item"),
        ("/api/images", {"recipes": [{}] * 500}, 400, "at most 120 items"),
        ("/api/images", {"recipes": [{"seed": -1}]}, 400, "greater than or equal to 0"),
        ("/api/images", {"recipes": [{"zeroed": ["q"]}]}, 422, "unknown latent 'q'"),
        ("/api/images", {"recipes": [{}], "controls": {"psi": 1}}, 422, "unknown control 'psi'"),
        ("/api/images", {"recipes": [{}], "steps": 3}, 422, "the number of steps is for models of many"),
        ("/api/trajectory", {"recipes": [{}]}, 422, "a trajectory needs a model of many steps"),
        ("/api/heat", {"recipes": [{}], "latent": "q"}, 422, "no latent 'q'"),
        ("/api/images", b" " * 300_000, 413, "a picture may have 32 MiB"),
        ("/api/pictures", b"not an image", 422, "the picture is not a whole image of a known kind"),
        ("/api/pictures", b"", 422, "it is empty"),
        ("/api/pictures?how=x", b"x", 400, "Invalid JSON"),
        ("/api/projections", b"x", 200, "is not a whole image"),
        ("/api/attributes/none", None, 422, "no longer kept"),
    ],
)
def test_refused_in_one_sentence(port: int, path: str, body: Any, status: int, line: str) -> None:
    answer = ask(port, path, body)
    assert answer[0] == status
    assert line in sentence(answer)
    assert not sentence(answer).startswith(":")
    assert "Traceback" not in answer[1].decode()


def test_too_many_bytes_are_not_read(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/api/pictures")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    connection.close()


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": "127.0.0.1:1"}, {"Origin": "http://evil.example"}, {"Origin": "null"}],
)
def test_other_pages_may_not_ask(port: int, headers: dict[str, str]) -> None:
    for path, body in (("/", None), ("/model.json", None), ("/api/images", {"recipes": [{}]})):
        assert ask(port, path, body, headers)[0] in (403, 421)


def test_the_page_itself_may(port: int) -> None:
    for name in ("127.0.0.1", "localhost"):
        own = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        assert ask(port, "/model.json", headers=own)[0] == 200


def test_a_token_lets_in(session: Session) -> None:
    with running(session, token="secret") as port:
        assert (
            ask(port, "/")[0] == ask(port, "/?token=wrong")[0] == ask(port, "/api/images", {"recipes": [{}]})[0] == 403
        )
        status, _, headers = ask(port, "/?token=secret")
        assert (status, headers["location"]) == (303, "/")
        cookie = headers["set-cookie"].partition(";")[0]
        assert "HttpOnly" in headers["set-cookie"]
        assert "SameSite=strict" in headers["set-cookie"]
        name = cookie.partition("=")[0]
        assert ask(port, "/model.json", headers={"Cookie": cookie})[0] == 200
        assert ask(port, "/model.json", headers={"Cookie": f"{name}=wrong"})[0] == 403


class Slow:
    """A session whose calls take until they are let go."""

    def __init__(self, session: Session) -> None:
        self._session, self.go, self.calls = session, threading.Event(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def with_controls(self, controls: Any) -> "Slow":
        return self

    def decode(self, *given: Any) -> Any:
        self.calls += 1
        self.go.wait(30)
        return self._session.decode(*given)


def test_the_latest_wins_and_a_full_queue_says_so(session: Session) -> None:
    slow = Slow(session)
    answers: dict[int, int] = {}
    with running(slow) as port:  # type: ignore[arg-type]

        def start(number: int, who: str | None) -> threading.Thread:
            def work() -> None:
                answers[number] = ask(port, "/api/images", {"recipes": [{"image": number}], "who": who})[0]

            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(0.05)
            return thread

        threads = [start(0, "slider")]
        while not slow.calls:
            time.sleep(0.01)
        threads += [start(number, "slider") for number in (1, 2, 3)]
        slow.go.set()
        for thread in threads:
            thread.join(30)
        assert answers == {0: 200, 1: 409, 2: 409, 3: 200}
        assert slow.calls == 2
        slow.go.clear()
        threads = [start(10, None)]
        while slow.calls < 3:
            time.sleep(0.01)
        threads += [start(number, None) for number in range(11, 11 + 64)]
        assert ask(port, "/api/images", {"recipes": [{}]})[0] == 503
        slow.go.set()
        for thread in threads:
            thread.join(30)
        assert {answers[number] for number in range(10, 75)} == {200}


def test_what_a_server_may_be_called() -> None:
    assert hosts_of("127.0.0.1", 8765) == ["127.0.0.1:8765", "localhost:8765", "[::1]:8765"]
    assert hosts_of("127.0.0.1", 80)[3:] == ["127.0.0.1", "localhost", "[::1]"]
    assert hosts_of("192.0.2.7", 8765) == ["192.0.2.7:8765"]
    assert hosts_of("2001:db8::7", 8765) == ["[2001:db8::7]:8765"]
    assert hosts_of("0.0.0.0", 8765) == []


def test_a_port_that_is_taken() -> None:
    with listen(None, None, 0) as first:
        port = first.getsockname()[1]
        with listen(None, None, port) as other:
            assert other.getsockname()[1] != port
        with pytest.raises(BackendUnavailable, match=f"cannot answer at 127.0.0.1 port {port}"):
            listen(None, port, 0)
    with pytest.raises(BackendUnavailable, match=r"choose another --port or --host"):
        listen("203.0.113.7", None, 0)
