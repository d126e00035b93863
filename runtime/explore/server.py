"""The page and what it asks for over HTTP, on this machine unless somebody says otherwise.

Nothing that comes in names a file, nothing that goes out names a path. Who may ask: a browser whose page came from
here (`Host` and `Origin` are checked), and with a token only who knows it.
"""

import asyncio
import hashlib
import json
import secrets
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hflow_rt.errors import BackendUnavailable, ConfigError, DataError, HFlowError, NoInverse, OutOfMemory
from hflow_rt.names import shown
from hflow_rt.runtime.explore.jobs import Busy, Jobs, Superseded
from hflow_rt.runtime.explore.page import PAGE, POLICY
from hflow_rt.runtime.explore.recipes import Number, Recipe
from hflow_rt.runtime.explore.studio import Studio
from hflow_rt.runtime.session import Session

if TYPE_CHECKING:
    import uvicorn

__all__ = ["application", "hosts_of", "listen", "serve", "server_of"]

_JSON_BYTES, _FILE_BYTES = 2**18, 2**25
_FRAMES, _SEARCH, _SEARCHES = 120, 2000, 4  # most pictures of a request, steps of a search, searches that wait
_REFUSED = (DataError, NoInverse, BackendUnavailable, ConfigError, OutOfMemory)

Body = TypeVar("Body", bound=BaseModel)


class _Asked(BaseModel):
    """What requests have in common: recipes, and how the model is to run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipes: tuple[Recipe, ...] = Field(min_length=1, max_length=_FRAMES)
    controls: dict[str, float] = {}
    steps: Number | None = None
    who: str | None = Field(default=None, max_length=64)


class _Heat(_Asked):
    latent: str


class _Animation(_Asked):
    on_the_way: bool = False
    fps: float = Field(default=12.0, ge=1, le=50)


class _Sets(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    with_it: tuple[str, ...] = Field(max_length=512)
    without: tuple[str, ...] = Field(max_length=512)


class _How(BaseModel):
    """What the address of a picture says beside its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="", max_length=256)
    label: str | None = None
    steps: Number | None = None
    search: int = Field(default=300, ge=1, le=_SEARCH)
    controls: dict[str, float] = {}

    @property
    def called(self) -> str:
        """The name of its file, fit for a terminal and a page."""
        return shown(self.name).strip() or "the picture"


class _TooLarge(Exception):  # noqa: N818 - a state, not a fault
    """More bytes than are taken."""


def application(session: Session, description: dict[str, Any], hosts: Sequence[str], token: str | None) -> ASGIApp:
    """The page and its answers. hosts: what a browser may call this server, `name:port`. token: who asks must know."""
    studio, jobs = Studio(session), Jobs()
    searches = Jobs(_SEARCHES)  # of their own: they take minutes, and on a model of their own

    async def model(request: Request) -> Response:
        return JSONResponse({**description, "engine": "server"})

    async def images(request: Request) -> Response:
        asked = await _json(request, _Asked)
        how = studio.set(asked.controls, asked.steps)
        return _binary(await jobs.run(lambda: studio.images(how, asked.recipes), asked.who))

    async def trajectory(request: Request) -> Response:
        asked = await _json(request, _Asked)
        how = studio.set(asked.controls, asked.steps)
        return _binary(await jobs.run(lambda: studio.trajectory(how, asked.recipes[0]), asked.who))

    async def animation(request: Request) -> Response:
        asked = await _json(request, _Animation)
        how = studio.set(asked.controls, asked.steps)
        made = await jobs.run(lambda: studio.animation(how, asked.recipes, asked.on_the_way, asked.fps), asked.who)
        return Response(made, media_type="image/gif")

    async def heat(request: Request) -> Response:
        asked = await _json(request, _Heat)
        how = studio.set(asked.controls, asked.steps)
        made, top = await jobs.run(lambda: studio.heat(how, asked.recipes[0], asked.latent), asked.who)
        return _binary(made, {"X-Largest": f"{top:.6g}"})

    async def latents(request: Request) -> Response:
        asked = await _json(request, _Asked)
        how = studio.set(asked.controls, asked.steps)
        return _binary(await jobs.run(lambda: studio.latents(how, asked.recipes, asked.controls)))

    async def pictures(request: Request) -> Response:
        asked, data = _how(request), await _body(request, _FILE_BYTES)
        how = studio.set(asked.controls, asked.steps)
        return JSONResponse(await jobs.run(lambda: studio.encode(how, data, asked.called, asked.label)))

    async def projections(request: Request) -> Response:
        asked, data = _how(request), await _body(request, _FILE_BYTES)
        return StreamingResponse(_searching(studio, searches, asked, data), media_type="application/x-ndjson")

    async def attributes(request: Request) -> Response:
        asked = await _json(request, _Sets)
        return JSONResponse(await jobs.run(lambda: studio.attribute(asked.with_it, asked.without)))

    async def attribute(request: Request) -> Response:
        return _binary(studio.attribute_file(request.path_params["name"]))

    posts = {
        "images": images,
        "trajectory": trajectory,
        "animation": animation,
        "heat": heat,
        "latents": latents,
        "pictures": pictures,
        "projections": projections,
        "attributes": attributes,
    }
    app = Starlette(
        routes=[
            Route("/model.json", model),
            *(Route(f"/api/{name}", _answered(handler), methods=["POST"]) for name, handler in posts.items()),
            Route("/api/attributes/{name}", _answered(attribute)),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
    )
    return _Guard(app, hosts, token)


class _Guard:
    """Lets in who may ask, and says with every answer what a page may do with it."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], token: str | None) -> None:
        self._app, self._hosts, self._token = app, hosts, token
        # browsers share cookies among the ports of a host, and each server has its own
        self._cookie = f"hflow_rt_{hashlib.sha256(token.encode()).hexdigest()[:16]}" if token else ""
        self._policy = "; ".join(f"{what} {where}" for what, where in (POLICY | {"frame-ancestors": "'none'"}).items())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = self._policy
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers["Cache-Control"] = "no-store"
            await send(message)

        refused = self._refused(Request(scope))
        await (refused or self._app)(scope, receive, marked)

    def _refused(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._hosts and host not in self._hosts:
            return _error("this address is not one of this server; open the one that it printed", 421)
        if origin is not None and origin.partition("://")[2] != host:
            return _error("another page may not ask here", 403)
        if self._token is None:
            return None
        given = request.query_params.get("token")
        if given is not None and secrets.compare_digest(given.encode(), self._token.encode()):
            kept = RedirectResponse(request.url.path, 303)
            kept.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
            return kept
        known = request.cookies.get(self._cookie, "")
        if secrets.compare_digest(known.encode(), self._token.encode()):
            return None
        return _error("this page needs its token; open the whole address that was printed", 403)


def listen(host: str | None, port: int | None, preferred: int) -> socket.socket:
    """An open socket at `port`, else at the preferred one, or at any if that is taken. Raises `BackendUnavailable`."""
    at = host or "127.0.0.1"
    family = socket.AF_INET6 if ":" in at else socket.AF_INET
    for candidate in [port] if port is not None else [preferred, 0]:
        try:
            return socket.create_server((at, candidate), family=family)
        except OSError as error:
            problem = error
    raise BackendUnavailable(
        f"cannot answer at {at} port {port or preferred} ({problem.strerror}); choose another --port or --host"
    )


def hosts_of(address: str, port: int) -> list[str]:
    """What a browser may call a server at this address; none where it answers at every address of the machine."""
    if address in ("0.0.0.0", "::"):
        return []
    local = address in ("127.0.0.1", "::1")
    names = ["127.0.0.1", "localhost", "[::1]"] if local else [f"[{address}]" if ":" in address else address]
    return [f"{name}:{port}" for name in names] + (names if port == 80 else [])  # which browsers leave out


def server_of(
    session: Session, description: dict[str, Any], listening: socket.socket, token: str | None
) -> "uvicorn.Server":
    """What answers on an open socket; only a browser that was sent here may ask, where none else can."""
    import uvicorn

    app = application(session, description, hosts_of(*listening.getsockname()[:2]), token)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, ws="none"))
    server.force_exit = True  # when it ends, it does not wait for those who still ask
    return server


def serve(session: Session, description: dict[str, Any], listening: socket.socket, token: str | None) -> None:
    """Answer on an open socket until Ctrl-C, which ends it at once."""
    with suppress(KeyboardInterrupt):  # is how it ends
        server_of(session, description, listening, token).run(sockets=[listening])


def _answered(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """What goes wrong is one sentence of JSON."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Superseded:
            return _error("something else was asked for since", 409)
        except Busy:
            return _error("too many requests wait; try again", 503)
        except _TooLarge:
            return _error(f"more was sent than is taken: a picture may have {_FILE_BYTES // 2**20} MiB; reduce it", 413)
        except asyncio.CancelledError:
            return _error("this server is being stopped", 503)
        except ClientDisconnect:
            return Response(status_code=499)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            return _error(f"{where}: {first['msg']}" if where else first["msg"], 400)
        except _REFUSED as error:
            return _error(str(error), 422)
        except HFlowError as error:  # of files of this machine
            print(f"error: {error}", file=sys.stderr, flush=True)
            return _error("the model cannot be used any more; the terminal of the server says why", 500)

    return answer


def _error(sentence: str, status: int) -> Response:
    return JSONResponse({"error": sentence}, status)


def _binary(content: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(content, media_type="application/octet-stream", headers=headers)


async def _json(request: Request, kind: type[Body]) -> Body:
    return kind.model_validate_json(await _body(request, _JSON_BYTES))


async def _body(request: Request, most: int) -> bytes:
    """The bytes that came. Raises `_TooLarge` as soon as they are too many."""
    if int(request.headers.get("content-length") or 0) > most:
        raise _TooLarge
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise _TooLarge
    return bytes(content)


def _how(request: Request) -> _How:
    """What the address says. Raises `ValidationError`."""
    return _How.model_validate_json(request.query_params.get("how", "{}"))


async def _searching(studio: Studio, jobs: Jobs, asked: _How, data: bytes) -> AsyncIterator[str]:
    """Lines of JSON: where the search stands, and last its result or an error."""
    loop, news = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()
    wanted = True

    def told(line: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(news.put_nowait, line)

    async def search() -> None:
        try:
            found = await jobs.run(
                lambda: studio.project(
                    data, asked.called, asked.label, asked.search, asked.controls, told, lambda: wanted
                )
            )
            await news.put(found)
        except Busy:
            await news.put({"error": "too many requests wait; try again"})
        except _REFUSED as error:
            await news.put({"error": str(error)})
        except Exception as error:  # of files of this machine, or a fault: the terminal says which
            print(f"error: {error}", file=sys.stderr, flush=True)
            if not isinstance(error, HFlowError):
                traceback.print_exception(error)
            await news.put({"error": "the model cannot be searched; the terminal of the server says why"})

    task = asyncio.create_task(search())
    try:
        while True:
            line = await news.get()
            yield json.dumps(line) + "\n"
            if "step" not in line:
                return
    finally:
        wanted = False
        task.cancel()
