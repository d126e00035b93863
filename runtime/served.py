"""What NVIDIA's Triton Inference Server runs in its Python backend: a session, which draws images or runs a loop."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hflow_rt.errors import HFlowError
from hflow_rt.limits import check_count
from hflow_rt.memory import need
from hflow_rt.runtime.bundle import BUNDLE
from hflow_rt.runtime.noise import parse_controls
from hflow_rt.runtime.session import Array, Session, load

__all__ = ["DEFAULTS", "ROUTE", "TritonPythonModel", "answered"]

DEFAULTS = "defaults"  # parameter of a model: what inputs are that a caller need not give, as JSON
ROUTE = "route"  # parameter of a model of the Python backend: what it does


def answered(session: Session, route: str, asked: Mapping[str, Any]) -> dict[str, Array]:
    """What the session says: the images of `sample`, those of `forward`, or latents and scores of `inverse`.

    asked: arrays of the route by name; seed, first, count, steps (numbers), std, control (texts) and label, an array
    each, where they are not as usual. Raises `HFlowError`.
    """
    controls, seed, first = parse_controls(_texts(asked, "control")), _one(asked, "seed", 0), _one(asked, "first", 0)
    if route == "sample":
        return {"image": _drawn(session.with_controls(controls), int(seed), int(first), asked)}
    if route == "forward":
        return {
            "image": session.forward({name: asked[name] for name in session.input_shapes if name in asked}, controls)
        }
    conditions = {name: asked[name] for name in session.conditions if name in asked}
    found = session.inverse(asked["image"], conditions, controls, seed=int(seed), first=int(first))
    return {**found.latents, **found.scores}


def _drawn(session: Session, seed: int, first: int, asked: Mapping[str, Any]) -> Array:
    """The images `[count, C, R, R]` that `hflow-rt sample` draws for the same words."""
    count, label = int(_one(asked, "count", 1)), _one(asked, "label", None)
    session = session.in_steps(int(_one(asked, "steps", 0))) if "steps" in asked else session
    label = _text(label) if isinstance(label, bytes) else label
    check_count("the number of images", count)
    size = 4 * count * session.channels * session.resolution**2
    need(size, f"{count:,} images", "ask for fewer together")
    parts = session.draw(range(first, first + count), _texts(asked, "std") or None, seed, option=label)
    return np.concatenate([session.forward(part) for part in parts])


def _one(asked: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return asked[name].reshape(-1)[0] if name in asked else otherwise


def _texts(asked: Mapping[str, Any], name: str) -> list[str]:
    return [_text(text) for text in asked.get(name, [])]


def _visible(device: int) -> str:
    """The one GPU that CUDA shall see, of those that the server sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return seen.split(",")[device] if seen else str(device)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class TritonPythonModel:
    """The server makes one for each instance, and calls it with the requests that wait."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle of this version, on the GPU that the server gives this instance, which is its own process."""
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._route = json.loads(args["model_config"])["parameters"][ROUTE]["string_value"]
        gpu = args["model_instance_kind"] == "GPU"
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = _visible(int(args["model_instance_device_id"]))
        self._session = load(folder, device="auto" if gpu else "cpu")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request: arrays, or the sentence that says what cannot be."""
        import triton_python_backend_utils as server  # type: ignore[import-not-found]

        found = []
        for request in requests:
            asked = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            try:
                arrays = answered(self._session, self._route, asked)
                found.append(server.InferenceResponse([server.Tensor(*named) for named in arrays.items()]))
            except HFlowError as error:
                found.append(server.InferenceResponse(error=server.TritonError(str(error))))
        return found
