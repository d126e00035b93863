"""`hflow-rt serve`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.opening import locate_bundle
from hflow_rt.cli.options import ModelArgument
from hflow_rt.cli.terminal import note, say, status


@app.command()
def serve(
    model: ModelArgument = None,
    repository: Annotated[
        Path | None,
        typer.Option(
            help="The models of a folder of 'export --engine triton-repo', instead of MODEL's.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where it answers; 0.0.0.0 lets in whoever reaches this machine.")] = (
        "127.0.0.1"
    ),
    http: Annotated[int, typer.Option(help="Port of HTTP.", min=1, max=65535)] = 8000,
    grpc: Annotated[int, typer.Option(help="Port of gRPC.", min=1, max=65535)] = 8001,
    server: Annotated[
        str | None, typer.Option(help="The server's program.", show_default="tritonserver, as on PATH")
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="One more argument of the server. Repeatable.", show_default=False),
    ] = None,
) -> None:
    """Serve a model with NVIDIA's Triton Inference Server, over HTTP and gRPC.

    Example: hflow-rt serve runs/my-run
    """
    import signal
    import sys
    from contextlib import suppress

    from platformdirs import user_cache_dir

    from hflow_rt.export.serving import models_in, program, repository_for, running

    if repository is None:
        repository = repository_for(locate_bundle(model), Path(user_cache_dir("hflow-rt", appauthor=False)) / "serving")
    names = models_in(repository)
    places = [f"--http-address={host}", f"--http-port={http}", f"--grpc-address={host}", f"--grpc-port={grpc}"]
    rest = [f"--model-repository={repository}", *places, "--allow-metrics=false", *(word or [])]
    command = [program(server, repository, host, http, grpc), *rest]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends as well
    at = f"http://{host}:{http}/v2"
    with suppress(KeyboardInterrupt), status() as progress, running(command, f"{at}/health/ready", progress) as wait:
        say(f"{', '.join(names)} at http://{host}:{http}, gRPC {host}:{grpc}")
        shown = min((name for name in names if name.endswith("_forward")), key=len, default=names[0])
        say(f"try: curl {at}/models/{shown}/config")
        note("Ctrl-C ends it")
        sys.stdout.flush()
        wait()
