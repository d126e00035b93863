"""`hflow-rt explore`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.opening import locate, open_session
from hflow_rt.cli.options import BackendOption, DeviceOption, ModelArgument
from hflow_rt.cli.terminal import note, say
from hflow_rt.errors import DataError
from hflow_rt.extras import need_extra
from hflow_rt.names import quoted

_PORT = 8765


@app.command()
def explore(
    model: ModelArgument = None,
    static: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a server, write a folder for any web host, where the browser runs the model.",
            show_default=False,
        ),
    ] = None,
    web_runtime: Annotated[
        Path | None,
        typer.Option(
            help="With --static: the folder dist of the npm package onnxruntime-web.",
            show_default="what was installed with hflow-rt, or node_modules",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Let other machines in at this address, with a token.", show_default="this machine alone"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Where it answers.", show_default=f"{_PORT}, or another if that is taken", min=1, max=65535),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="What the address must say to be let in.", show_default="a new one with --host, else none"),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
) -> None:
    """Look into a model in the browser: samples, sliders, your pictures, everything between them.

    Example: hflow-rt explore --backend onnx
    """
    if static is not None:
        if (host, port, token, backend) != (None, None, None, "onnx"):
            raise DataError("--host, --port, --token and --backend are for a server; a static page has none; omit them")
        from hflow_rt.runtime.explore.static import write_static

        found = write_static(locate(model), static, web_runtime)
        for line in found:
            say(line)
        say(f"next: python -m http.server --directory {quoted(static)} 8000")
        return
    need_extra("explore", "starlette", "uvicorn")
    import os
    import secrets
    import sys
    import threading
    import webbrowser
    from urllib.parse import quote

    from hflow_rt.runtime.explore.description import described
    from hflow_rt.runtime.explore.server import listen, serve

    session = open_session(model, backend, device)
    description = described(session)
    if host is not None and token is None:
        token = secrets.token_urlsafe(16)
    listening = listen(host, port, _PORT)
    address = listening.getsockname()
    if port is None and address[1] != _PORT:
        note(f"port {_PORT} is taken; this is another")
    named = f"[{host}]" if host is not None and ":" in host else host or "127.0.0.1"
    at = f"http://{named}:{address[1]}/" + (f"?token={quote(token, safe='')}" if token else "")
    say(f"{description['name']} is at {at}")
    note("Ctrl-C ends it")
    sys.stdout.flush()
    if browser and sys.stdout.isatty():
        threading.Timer(0.5, webbrowser.open, [at]).start()  # once somebody answers
    serve(session, description, listening, token)
    sys.stdout.flush()
    os._exit(0)  # a call of the model or a search goes on in a thread, and nobody waits for it
