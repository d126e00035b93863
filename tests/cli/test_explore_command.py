"""`hflow-rt explore`: where it answers, how it ends, and the folder it writes."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, refused
from safetensors.numpy import load_file

from hflow_rt.runtime.explore import static

Command = Callable[..., Any]


def test_it_says_where_it_is_and_ends_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "hflow_rt.cli", "explore", "hflow-emoji", "--no-browser", "--port"]
    command += [str(port), "--token", "a&b"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == f"hflow-emoji is at http://127.0.0.1:{port}/?token=a%26b\n"
        jar = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        jar.open(f"http://127.0.0.1:{port}/?token=a%26b", timeout=30).close()
        with jar.open(f"http://127.0.0.1:{port}/model.json", timeout=30) as answer:
            assert json.load(answer)["name"] == "hflow-emoji"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_a_folder_for_any_host(hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runtime = tmp_path / "dist"
    runtime.mkdir()
    refused(hflow("explore", "--static", "site", "--web-runtime", "dist"), "npm install onnxruntime-web")
    for name in static.RUNTIME:
        (runtime / name).write_text(name)
    found = ok(hflow("explore", "hflow-emoji", "--static", "site", "--web-runtime", "dist"))
    assert "hflow-emoji, 5.8 MB of model: site/" in found.out
    assert "next: python -m http.server --directory site" in found.out
    written = {path.relative_to("site").as_posix() for path in Path("site").rglob("*") if path.is_file()}
    needed = {"index.html", "model.json", "forward.onnx", "weights.bin", "ort/LICENSE.txt", "worker.js", "main.js"}
    assert needed <= written
    assert "server.js" not in written
    assert "'wasm-unsafe-eval'" in Path("site/index.html").read_text()
    assert str(tmp_path) not in Path("site/model.json").read_text()
    # made again, of the model that is taken where there is no run; tables are float32 for the page
    assert "ihdm-emoji, 9." in ok(hflow("explore", "--static", "site", "--web-runtime", "dist")).out
    about = json.loads(Path("site/model.json").read_text())["web"]
    for table in (about["bank"], about["routes"]["forward"]["schedule"]):
        assert {array.dtype for array in load_file(f"site/{table}").values()} == {np.dtype("float32")}
    Path("site/CNAME").write_text("keep")
    refused(hflow("explore", "--static", "site", "--web-runtime", "dist"), "site holds CNAME, which is not of such")
    assert Path("site/CNAME").read_text() == "keep"
    refused(hflow("explore", "--static", "site", "--port", "99"), "a static page has none; omit them")


def test_a_folder_without_the_extra(python: Command, tmp_path: Path) -> None:
    for name in static.RUNTIME:
        (tmp_path / name).write_text(name)
    code = """
import sys
from pathlib import Path
sys.modules |= {"starlette": None, "uvicorn": None}
from hflow_rt.assets import pretrained
from hflow_rt.runtime.explore.static import write_static
print(write_static(pretrained("hflow-emoji"), Path(sys.argv[1]) / "site", Path(sys.argv[1])))
"""
    assert "hflow-emoji, 5.8 MB of model" in ok(python(code, tmp_path)).out


def test_without_its_packages(hflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(hflow("explore"), "this command needs starlette: pip install 'hflow-rt[explore]'")
