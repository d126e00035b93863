"""The manifest of a bundle: what an exported model is, so that it can be run without its training code."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hflow_rt.choices import Precision, Route, Routes, Tuning
from hflow_rt.errors import BundleError
from hflow_rt.names import image_size

__all__ = [
    "CALIBRATED",
    "HALF",
    "LOG_PROB",
    "MANIFEST",
    "MODEL",
    "MODULE",
    "SCHEMA",
    "STD",
    "BundledFile",
    "Engines",
    "Graph",
    "Latent",
    "Loop",
    "Manifest",
    "Plan",
    "Prior",
    "Role",
    "Space",
    "Tensor",
    "Way",
    "graph_sha256",
    "graphs_of",
    "read_manifest",
    "routes_of",
]

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
CALIBRATED = "calibrated"  # at what, of what a model file and a manifest say of their weights
HALF = "float16"  # what a model file says of its weights if they were rounded
LOG_PROB = "log_prob"  # the score that an exact inverse yields, in nats
MODULE = "module"  # key under which a node of a graph names the module it came from
SCHEMA = 2
STD = ("0.7",)
# what a tensor of a graph is, which says where its values come from:
#   image      in [0, 1]                            latent     of the prior, times its std
#   noise      standard normal, beside either       uniform    in [0, 1), beside either
#   condition  a one-hot choice among options       control    a number, its default unless the caller gives another
#   value      what another graph yields: another space, or what a loop carries
#   schedule   `[1, *shape]`, a row of a loop's table, the same for all images of a call
#   score      one number an image, such as its log-probability
#   grid       what a value that is read off becomes a multiple of, so that it takes few bits; 0 for not at all
Role = Literal["image", "latent", "noise", "uniform", "condition", "control", "value", "schedule", "score", "grid"]
# where a latent of a sample comes from: standard normal numbers times its std, the same without a temperature, or a row
# of a table of latents of real images
Prior = Literal["normal", "unscaled", "bank"]
# how a latent goes from one image to another, whatever mode is asked for: in a line, or by cosine and sine, which keeps
# the variance of noise
Way = Literal["line", "arc"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Entry):
    """A named tensor of a graph; `shape` is without the batch axis, which is first and dynamic (see `batched`)."""

    name: str
    shape: tuple[int, ...]
    role: Role
    dtype: Literal["float32"] = "float32"
    range: tuple[float, float] | None = None
    default: float | None = Field(default=None, description="of a control, and of noise that is only drawn by who asks")

    def batched(self, batch: int) -> tuple[int, ...]:
        """Its shape in a call with `batch` images."""
        return (1 if self.role == "schedule" else batch, *self.shape)


class Graph(_Entry):
    """One graph of the model."""

    file: str
    weights: tuple[str, ...] = Field(default=(), description="files beside it that hold its constants")
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: tuple[int, int] = Field(description="smallest and largest batch of one call")
    operators: dict[str, int]
    rewrites: dict[str, int] = Field(default={}, description="what tuning changed, and how often")

    @field_validator("weights", mode="before")
    @classmethod
    def _upgrade(cls, value: Any) -> Any:
        """Former bundles have one file or none."""
        return () if value is None else (value,) if isinstance(value, str) else value

    @property
    def files(self) -> tuple[str, ...]:
        """All that opening it reads."""
        return self.file, *self.weights


class Latent(_Entry):
    """A latent and its prior, in the order coarse to fine."""

    name: str
    shape: tuple[int, ...]
    prior_std: float
    prior: Prior = "normal"
    way: Way | None = Field(default=None, description="of interpolations; None: by their mode")


class Loop(_Entry):
    """A route of several calls, see `Loop` in the contract of models."""

    start: str
    step: str
    steps: int = Field(gt=0)
    schedule: str = Field(description="file of the tables `[steps, *shape]`, by input of `step`")
    carry: dict[str, str]
    last: tuple[str, ...] = ()
    every: dict[str, str] = {}
    leads_to: tuple[str, ...] = Field(default=(), description="tables that let it be of fewer calls")

    @property
    def graphs(self) -> tuple[str, str]:
        """What it runs."""
        return self.start, self.step


class Space(_Entry):
    """Another space than that of the latents: the graphs into it, back, and from it straight to an image."""

    into: str | None = None
    back: str | None = None
    decode: str | None = None
    draw: str | None = Field(default=None, description="of a space of distributions: draws an image at random")
    slots: bool = Field(default=False, description="its tensor is `[S, D]`, a row for each of S layers, coarse to fine")

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, values: Any) -> Any:
        """Former bundles have a pair: into it and back."""
        return dict(zip(("into", "back"), values, strict=True)) if isinstance(values, list | tuple) else values

    @property
    def graphs(self) -> tuple[str, ...]:
        """Those that it has."""
        return tuple(name for name in (self.into, self.back, self.decode, self.draw) if name is not None)


class BundledFile(_Entry):
    """What a file must be."""

    sha256: str
    bytes: int


class Plan(_Entry):
    """One graph as a TensorRT engine."""

    file: str
    layers: str = Field(description="file beside it that lists its layers")
    layers_of: Literal["network", "engine"] = Field(
        default="network", description="whose layers: as they were given to the builder, or as a GPU loaded them"
    )
    onnx: str = Field(description="digest of the graph it was built from, and of its constants")
    types: dict[str, int] = Field(description="how many layers yield each number type, most frequent first")
    seconds: float = Field(description="how long building took, or refitting")
    refitted: bool = Field(default=False, description="whether it was built with other weights and given these")


class Engines(_Entry):
    """Plans that were built together, for one kind of machine."""

    flavor: Literal["tensorrt", "rtx"]
    version: str
    gpu: str | None = Field(description="the GPU they were built on, or None if they were built ahead of time")
    capabilities: tuple[str, ...] = Field(description="compute capabilities they run on")
    batch: tuple[int, int, int] = Field(description="smallest, most likely and largest batch of one call")
    workspace: int | None = Field(default=None, description="limit on temporary memory, MiB")
    refittable: bool = Field(default=False, description="whether their weights can be replaced without a build")
    plans: dict[str, Plan]
    timing_cache: str | None = None
    parity: dict[str, Any] | None = None
    verified: bool = False


class Manifest(_Entry):
    """Everything the runtime needs to know."""

    schema_version: Literal[2] = 2
    family: str
    config: dict[str, Any]
    resolution: int
    latents: tuple[Latent, ...]
    std: tuple[str, ...] = Field(default=STD, description="what samples are drawn at by default, as --std is written")
    conditions: dict[str, tuple[str, ...]] = Field(
        default={}, description="what graphs take beside image or latents: options by name, as one-hot vectors"
    )
    routes: dict[Route, str | Loop] = Field(description="a graph each, or a loop of calls of two graphs")
    absent: dict[Route, str] = Field(default={}, description="route that the family lacks: why, in one sentence")
    bank: str | None = Field(default=None, description="file of the latents whose prior is a bank, `[rows, *shape]`")
    spaces: dict[str, Space] = {}
    graphs: dict[str, Graph]
    precision: Precision = "fp32"
    tuning: Tuning = Field(default="any", description="machines that the graphs were written for")
    opset: int
    tools: dict[str, str]
    checkpoint: dict[str, Any] = Field(description="sha256 of the weights and what training said of them")
    files: dict[str, BundledFile]
    parity: dict[str, Any] | None = None
    verified: bool = False
    engines: dict[str, Engines] = Field(default={}, description="TensorRT engines by key, newest last")

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "choices" in values:  # as former bundles call conditions
            values = {name: value for name, value in values.items() if name != "choices"} | {
                "conditions": values["choices"]
            }
        return _from_schema_1(values) if values.get("schema_version") == 1 else values

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        if self.config.get("channels", 3) not in (1, 3):
            raise ValueError("an image has 3 channels, or 1")
        for name in self.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"file '{name}' lies outside the bundle")
        for name, graph in self.graphs.items():
            for file in graph.files:
                if file not in self.files:
                    raise ValueError(f"graph '{name}' is in {file}, which is not among the files")
        for route, found in self.routes.items():
            if isinstance(found, Loop) and found.schedule not in self.files:
                raise ValueError(f"route '{route}' has its schedule in {found.schedule}, which is not among the files")
        for key, engines in self.engines.items():
            for plan in engines.plans.values():
                for file in (plan.file, plan.layers):
                    if file not in self.files:
                        raise ValueError(f"engine '{key}' is in {file}, which is not among the files")
        return self

    @property
    def channels(self) -> int:
        """C, of the image: 3, or 1 for grey."""
        return int(self.config.get("channels", 3))

    @property
    def size(self) -> str:
        """Of the image, for people: `64x64`, or `28x28 grey`."""
        return image_size(self.resolution, self.channels)

    def graphs_for(self, routes: Routes) -> list[str]:
        """The graphs that routes need; for both all that there are, those of other spaces among them."""
        if routes == "both":
            return list(self.graphs)
        ways = [self.routes[route] for route in routes_of(routes) if route in self.routes]
        return [name for way in ways for name in graphs_of(way) if name in self.graphs]

    @property
    def run_files(self) -> list[str]:
        """The files that a session of the graphs reads, sorted."""
        files = {file for graph in self.graphs.values() for file in (graph.file, *graph.weights)} | {self.bank}
        files |= {way.schedule for way in self.routes.values() if isinstance(way, Loop)}
        return sorted(file for file in files if file is not None)

    def identity(self, engines: str | None = None) -> str:
        """What tells apart models whose results differ, as a sha256: weights, graphs or engines, and the default std.

        engines: the key of the TensorRT engines that run instead of the graphs.
        """
        plans = [] if engines is None else [plan.file for plan in self.engines[engines].plans.values()]
        files = {file: self.files[file].sha256 for file in (*self.run_files, *plans)}
        told = {"weights": self.checkpoint.get("sha256"), "files": files, "std": self.std}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape without batch, coarse to fine."""
        return {latent.name: latent.shape for latent in self.latents}

    @property
    def prior_std(self) -> dict[str, float]:
        """Name to std at temperature 1."""
        return {latent.name: latent.prior_std for latent in self.latents}

    def dump(self) -> str:
        """The JSON text of the manifest file."""
        return self.model_dump_json(indent=1) + "\n"


def graph_sha256(manifest: Manifest, name: str) -> str:
    """Digest of a graph: of its ONNX file and of the files of its constants."""
    digests = [manifest.files[file].sha256 for file in manifest.graphs[name].files]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def routes_of(choice: Routes) -> tuple[Route, ...]:
    """The routes that a choice names."""
    every: tuple[Route, ...] = get_args(Route)
    return every if choice == "both" else (choice,)


class _Looped(Protocol):
    @property
    def graphs(self) -> tuple[str, ...]: ...


def graphs_of(way: str | _Looped) -> tuple[str, ...]:
    """The graphs of a route, which is one by name or a loop of several."""
    return (way,) if isinstance(way, str) else way.graphs


def _from_schema_1(values: dict[str, Any]) -> Any:
    """Which knew exact flows only: their graphs had set names, and what a tensor was its name told.

    What is not as it should be stays as it is, for validation to name.
    """
    try:
        latents = {latent["name"] for latent in values["latents"]}
        conditions = values.get("conditions", {}).keys()

        def role(graph: str, tensor: dict[str, Any]) -> Role:
            name = tensor["name"]
            if name in ("image", "uniform"):
                return name  # type: ignore[no-any-return]
            if name in latents or name in conditions:
                return "latent" if name in latents else "condition"
            return "score" if not tensor["shape"] else "noise" if graph == "bound" else "value"

        def told(graph: str, tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [tensor | {"role": role(graph, tensor)} for tensor in tensors]

        graphs = {
            name: graph | {side: told(name, graph[side]) for side in ("inputs", "outputs")}
            for name, graph in values["graphs"].items()
        }
        routes = {name: name for name in get_args(Route) if name in graphs}
    except (KeyError, TypeError, AttributeError):
        return values
    return values | {"schema_version": SCHEMA, "graphs": graphs, "routes": routes}


def read_manifest(bundle: Path) -> Manifest:
    """Parse a bundle's manifest. Raises `BundleError` if it is missing, broken or of another version."""
    path = bundle / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"{bundle} is not a bundle: it has no {MANIFEST}; make one with 'hflow-rt export'") from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise BundleError(f"{path} is broken or of another version ({where}: {first['msg']}); export again") from error
