"""A model on NVIDIA's Triton Inference Server, or on any that speaks its protocol, called as a session is."""

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.extras import needed
from hflow_rt.limits import check_count, check_seed
from hflow_rt.runtime.arrays import as_pixels
from hflow_rt.runtime.noise import parse_std
from hflow_rt.runtime.served import DEFAULTS
from hflow_rt.runtime.session import Array, Encoded, Stds

__all__ = ["Client"]

_TOGETHER = 16  # images of a loop in a call, whose latents are large
_NUMBERS = {"float32": "FP32", "int32": "INT32", "uint64": "UINT64", "object": "BYTES"}


class Client:
    """The models `NAME_forward`, `NAME_inverse` and `NAME_sample` that `export --engine triton-repo` wrote.

    >>> import hflow_rt
    >>> with hflow_rt.Client("localhost:8001", "my-run") as session:  # doctest: +SKIP
    ...     session.sample(4, std=0.7, seed=1).shape
    (4, 3, 64, 64)
    """

    def __init__(self, address: str, name: str, *, timeout: float = 60.0) -> None:
        """address: of the server's gRPC, `host:port`. timeout: seconds that a call may take.

        Raises `BackendUnavailable` without tritonclient, and where nothing answers.
        """
        with needed("tritonclient", "calling a server needs tritonclient; pip install 'hflow-rt[serve]'"):
            import tritonclient.grpc as grpc

        self._grpc: Any = grpc
        self._address, self._name, self._timeout = address, name, timeout
        self._client = self._grpc.InferenceServerClient(address)
        self._known: dict[str, dict[str, Any]] = {}
        try:
            ready = self._client.is_server_ready(client_timeout=timeout)
        except self._grpc.InferenceServerException as error:
            raise self._lost(error) from error
        if not ready:
            raise BackendUnavailable(f"the server at {address} is not ready; wait, or look at what it says")

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client: {self._name} at {self._address}>"

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def forward(self, latents: Mapping[str, Any], controls: Mapping[str, float] | None = None) -> Array:
        """As `Session.forward`, on numpy arrays."""
        image: Array = self._all("forward", latents, controls or {})["image"]
        return image

    def inverse(
        self,
        images: Any,
        conditions: Mapping[str, Any] | None = None,
        controls: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        first: int = 0,
    ) -> Encoded:
        """As `Session.inverse`, on numpy arrays."""
        channels, side, _ = self._inputs("inverse")["image"][-3:]
        pixels = as_pixels(np.asarray(images), side, channels)
        outputs = self._all("inverse", {"image": pixels, **(conditions or {})}, controls or {}, (seed, first))
        outputs |= {name: np.asarray(rows) for name, rows in (conditions or {}).items()}
        scores = {name: values for name, values in outputs.items() if values.ndim == 1}
        return Encoded({name: values for name, values in outputs.items() if name not in scores}, scores)

    def sample(
        self,
        n: int,
        std: Stds | None = None,
        seed: int = 0,
        *,
        option: str | None = None,
        controls: Mapping[str, float] | None = None,
        steps: int | None = None,
        first: int = 0,
    ) -> Array:
        """As `Session.sample`: the images `first`, ... of `seed`."""
        check_count("the number of images", n)
        asked: dict[str, NDArray[Any]] = {"count": np.array([n], np.int32), **_numbered(seed, first)}
        asked |= {} if steps is None else {"steps": np.array([steps], np.int32)}
        asked |= {} if option is None else {"label": _texts([option])}
        asked |= {} if std is None else {"std": _texts(_std_words(std))}
        asked |= _controls(controls or {})
        return self._infer("sample", asked)["image"]

    def _all(
        self, model: str, values: Mapping[str, Any], controls: Mapping[str, float], drawn: tuple[int, int] = (0, 0)
    ) -> dict[str, Array]:
        """Outputs on any number of images, by calls as large as the server takes. drawn: seed and first image."""
        wanted = self._inputs(model)
        arrays = {name: np.asarray(array, np.float32) for name, array in values.items()}
        if not arrays:
            raise DataError(f"{self._name}_{model} needs {', '.join(wanted)}; received nothing")
        count = len(next(iter(arrays.values())))
        check_count("the number of images", count)
        if "control" in wanted:  # a loop
            return self._looped(model, arrays, controls, drawn)
        for name, value in {**self._config(model)["defaults"], **controls}.items():
            if name not in wanted:
                raise DataError(f"unknown control '{name}' of {self._name}_{model}; it takes {', '.join(wanted)}")
            arrays.setdefault(name, np.full((count, *wanted[name]), value, np.float32))
        found = {name: array.shape[1:] for name, array in arrays.items()}
        if found != {name: tuple(shape) for name, shape in wanted.items()} or {len(a) for a in arrays.values()} != {
            count
        }:
            needs = ", ".join(f"{name} {list(shape)}" for name, shape in wanted.items())
            raise DataError(f"{self._name}_{model} needs {needs}, one an image; received {found}")
        most = int(self._config(model)["max_batch_size"])
        parts = [
            self._infer(model, {name: array[start : start + most] for name, array in arrays.items()})
            for start in range(0, count, most)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _looped(
        self, model: str, arrays: Mapping[str, Array], controls: Mapping[str, float], drawn: tuple[int, int]
    ) -> dict[str, Array]:
        """Outputs of a loop, which takes any number of images; the server says what does not fit."""
        wanted, (seed, first) = self._inputs(model), drawn
        if unknown := arrays.keys() - wanted.keys():
            raise DataError(f"unknown '{min(unknown)}' of {self._name}_{model}; it takes {', '.join(wanted)}")
        count = len(next(iter(arrays.values())))
        parts = []
        for start in range(0, count, _TOGETHER):
            asked = {name: array[start : start + _TOGETHER] for name, array in arrays.items()}
            asked |= _numbered(seed, first + start) if "seed" in wanted else {}
            parts.append(self._infer(model, {**asked, **_controls(controls)}))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _config(self, model: str) -> dict[str, Any]:
        """What the server says of a model, once."""
        if model not in self._known:
            name = f"{self._name}_{model}"
            try:
                told = self._client.get_model_config(name, as_json=True, client_timeout=self._timeout)["config"]
            except self._grpc.InferenceServerException as error:
                raise self._lost(error) from error
            parameters = told.get("parameters", {})
            defaults = parameters.get(DEFAULTS, {}).get("string_value", "{}")
            self._known[model] = told | {"defaults": json.loads(defaults)}
        return self._known[model]

    def _inputs(self, model: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what a model takes for each image."""
        return {one["name"]: _shape(one) for one in self._config(model)["input"]}

    def _infer(self, model: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
        """One call. A number an image has a place for it on the way, because a batch of none is no shape there."""
        told = self._config(model)
        inputs = []
        for one in told["input"]:
            if one["name"] not in arrays:
                continue
            array = arrays[one["name"]]
            array = array[:, None] if array.ndim == 1 and "reshape" in one else array
            inputs.append(self._grpc.InferInput(one["name"], array.shape, _NUMBERS[str(array.dtype)]))
            inputs[-1].set_data_from_numpy(array)
        try:
            result = self._client.infer(f"{self._name}_{model}", inputs, client_timeout=self._timeout)
        except self._grpc.InferenceServerException as error:
            raise self._lost(error) from error
        found = {one["name"]: (result.as_numpy(one["name"]), "reshape" in one) for one in told["output"]}
        return {name: values[:, 0] if single else values for name, (values, single) in found.items()}

    def _lost(self, error: Any) -> Exception:
        """What went wrong, as we say it: what was asked for, or the server."""
        code, said = str(error.status()), (error.message() or str(error)).splitlines()[0]
        if "UNAVAILABLE" in code or "DEADLINE" in code:
            return BackendUnavailable(
                f"the server at {self._address} does not answer ({said}); start it, or wait for it"
            )
        if "NOT_FOUND" in code or "unknown model" in said:
            return BackendUnavailable(f"the server at {self._address} has no such model ({said}); check its repository")
        return DataError(f"the server at {self._address} refused: {said}")


def _shape(told: Mapping[str, Any]) -> tuple[int, ...]:
    return () if "reshape" in told else tuple(int(side) for side in told["dims"])


def _numbered(seed: int, first: int) -> dict[str, NDArray[Any]]:
    check_seed(seed)
    return {"seed": np.array([seed], np.uint64), "first": np.array([first], np.uint64)}


def _controls(controls: Mapping[str, float]) -> dict[str, NDArray[Any]]:
    return {"control": _texts([f"{name}={value}" for name, value in controls.items()])} if controls else {}


def _texts(words: Sequence[str]) -> NDArray[Any]:
    return np.array([word.encode() for word in words], object)


def _std_words(std: Stds) -> list[str]:
    """As `--std` takes it."""
    if isinstance(std, Mapping):
        return [f"{name}={value}" for name, value in parse_std(std, std).items()]
    return list(map(str, std)) if isinstance(std, Sequence) and not isinstance(std, str) else [str(std)]
