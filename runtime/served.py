"""What NVIDIA's Triton Inference Server runs in its Python backend: a model that draws images."""

from pathlib import Path
from typing import Any

import numpy as np

from hflow_rt.errors import HFlowError
from hflow_rt.limits import check_count
from hflow_rt.memory import need
from hflow_rt.runtime.bundle import BUNDLE
from hflow_rt.runtime.noise import parse_controls
from hflow_rt.runtime.session import Array, Session, load

__all__ = ["DEFAULTS", "TritonPythonModel", "drawn"]

DEFAULTS = "defaults"  # parameter of a model: what inputs are that a caller need not give, as JSON


def drawn(session: Session, asked: dict[str, Any]) -> Array:
    """The images `[count, C, R, R]` that `hflow-rt sample` draws for the same words. Raises `HFlowError`.

    asked: any of seed, count, first, steps (numbers), std, control (texts) and label, an array each.
    """

    def one(name: str, otherwise: Any) -> Any:
        return asked[name].reshape(-1)[0] if name in asked else otherwise

    def texts(name: str) -> list[str]:
        return [text.decode() if isinstance(text, bytes) else str(text) for text in asked.get(name, [])]

    first, count, label = int(one("first", 0)), int(one("count", 1)), one("label", None)
    session = session.in_steps(int(one("steps", 0))) if "steps" in asked else session
    session = session.with_controls(parse_controls(texts("control")))
    label = label.decode() if isinstance(label, bytes) else label
    check_count("the number of images", count)
    size = 4 * count * session.channels * session.resolution**2
    need(size, f"{count:,} images", "ask for fewer together")
    parts = session.draw(range(first, first + count), texts("std") or None, int(one("seed", 0)), option=label)
    return np.concatenate([session.forward(part) for part in parts])


class TritonPythonModel:
    """The server makes one for each instance, and calls it with the requests that wait."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle of this version."""
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._session = load(folder, device="auto" if args["model_instance_kind"] == "GPU" else "cpu")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request: images, or the sentence that says what cannot be."""
        import triton_python_backend_utils as server  # type: ignore[import-not-found]

        found = []
        for request in requests:
            asked = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            try:
                found.append(server.InferenceResponse([server.Tensor("image", drawn(self._session, asked))]))
            except HFlowError as error:
                found.append(server.InferenceResponse(error=server.TritonError(str(error))))
        return found
