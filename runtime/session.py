"""One way to run a bundle, whatever computes it: `load(path, backend).forward / inverse / sample`."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.choices import Route
from hflow_rt.conditions import check_conditions, in_turn, of_option
from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.files import destination
from hflow_rt.limits import check_count
from hflow_rt.manifest import LOG_PROB, Loop
from hflow_rt.memory import need
from hflow_rt.runtime.arrays import as_bytes, as_kind, as_pixels, check_tensors, filled, library, to_numpy
from hflow_rt.runtime.backends import BACKENDS, check_backend
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.images.pictures import check_folder, save_image, to_picture, write_pictures
from hflow_rt.runtime.known import LATENT_SPACE, Known
from hflow_rt.runtime.latents.operations import check_latents
from hflow_rt.runtime.loops import first_inputs
from hflow_rt.runtime.noise import parse_std

__all__ = ["GRID", "LATENT_SPACE", "Array", "Encoded", "Session", "Stds", "load", "open_bundle"]

Array = NDArray[np.float32]
Stds = float | str | Sequence[str] | Mapping[str, float]  # see `parse_std`

# What noise that is read off in sequence is rounded to, because what follows makes up for it: half precision then holds
# it to 128 stds.
GRID = 1 / 16


@dataclass(frozen=True)
class Encoded:
    """Latents by name `[B, *shape]`, and numbers `[B]` that the model yields beside them.

    Conditions that were given are among the latents, so that `forward` has the same.
    """

    latents: dict[str, Any]
    scores: dict[str, Any]

    @property
    def log_prob(self) -> Any:
        """Log-probability in nats (bits/dim = -log_prob / (D ln 2) + bits); None where the model knows none."""
        return self.scores.get(LOG_PROB)


class Session(Known):
    """A loaded model. Arrays come back as the kind that went in: numpy, or torch on the tensor's device.

    >>> import hflow_rt
    >>> with hflow_rt.load() as session:
    ...     session.resolution
    64
    """

    def __repr__(self) -> str:
        """What is loaded, what runs it, whether that was proved, and what the latents are."""
        what = f"{self.manifest.family} {self.manifest.size} on {self.backend}"
        latents = ", ".join(f"{name} {list(shape)}" for name, shape in self.latent_shapes.items())
        return f"<Session: {what}, {'verified' if self.verified else 'UNVERIFIED'}\n latents {latents}>"

    def close(self) -> None:
        """Give back memory of a GPU, which otherwise the end of the process does."""
        self._engine.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def in_steps(self, steps: int) -> "Session":
        """This model with fewer calls of its network an image, both ways; it shares what runs with this session.

        Latents of so many steps have so many noises. Raises `DataError` where that is not possible.

        >>> import hflow_rt
        >>> hflow_rt.load().in_steps(5).steps
        5
        """
        return Session(self.drawing.in_steps(steps), self._engine).with_controls(self._chosen)

    def with_controls(self, controls: Mapping[str, float]) -> "Session":
        """This model with other defaults of its controls; it shares what runs with this session.

        Raises `DataError` as `check_controls` does.

        >>> import hflow_rt
        >>> hflow_rt.load().with_controls({"delta": 0.01}).controls
        {'delta': 0.01}
        """
        self.check_controls(controls)
        made = Session(self.bundle, self._engine)
        made._chosen = {**self._chosen, **controls}
        return made

    def forward(self, latents: Mapping[str, Any], controls: Mapping[str, float] | None = None) -> Any:
        """Latents to images float32 `[B, C, R, R]` in [0, 1].

        controls: those of `Session.controls` that shall not have their default. Raises `DataError` for what does not
        fit.

        >>> import hflow_rt
        >>> session = hflow_rt.load()
        >>> latents = next(session.draw([7], seed=1))
        >>> session.forward(latents).shape
        (1, 3, 64, 64)
        """
        arrays, restore = self._checked(latents, controls)
        return restore(self.run("forward", arrays)["image"])

    def _checked(self, latents: Mapping[str, Any], controls: Mapping[str, float] | None) -> tuple[dict[str, Any], Any]:
        """The inputs of `forward`, and a function that gives results their kind. Raises `DataError`."""
        arrays, restore = self._received(latents)
        check_latents(arrays, self.input_shapes, "these latents")
        check_conditions(self.conditions, arrays)
        return arrays | self._set({**self._chosen, **(controls or {})}, next(iter(arrays.values()))), restore

    def trajectory(self, latents: Mapping[str, Any], controls: Mapping[str, float] | None = None) -> Iterator[Any]:
        """The images of `forward` on their way, `[B, C, R, R]` after each call of its loop; the last are its result.

        Of a model that takes one call, that alone. At most as many images as an engine takes in a call. Raises as
        `forward` does.

        >>> import hflow_rt
        >>> session = hflow_rt.load()
        >>> len([*session.trajectory(next(session.draw([0])))]) == session.steps
        True
        """
        loop = self.manifest.routes.get("forward")
        if not isinstance(loop, Loop):
            yield self.forward(latents, controls)
            return
        arrays, restore = self._checked(latents, controls)
        values, begun, calls = self._begun(loop, arrays, ["image"])
        for outputs in calls(first_inputs(loop, values, begun)):
            yield restore(outputs["image"])

    def inverse(
        self,
        images: Any,
        conditions: Mapping[str, Any] | None = None,
        controls: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        first: int = 0,
        only: str | None = None,
        posterior: bool = False,
    ) -> Encoded:
        """Images, float32 `[B, C, R, R]` in [0, 1] or uint8 `[B, R, R, C]`, to latents and log-probability.

        conditions: one-hot `[B, options]` for every condition of the model. controls: as of `forward`, which must have
        the same. seed, first: of what is random in the latents of an image, which most models have not; the first
        image is number `first` of `seed`. only: the one latent that is wanted, if a loop need not be run for it.
        posterior: draw latents that could be the image's, where the model tells a distribution of them, instead of its
        mean. Raises `DataError`, and `NoInverse` where there is none.

        >>> import hflow_rt
        >>> session = hflow_rt.load()
        >>> session.inverse(session.read("photo.png")).latents["residual"].shape
        (1, 3, 64, 64)
        """
        self._check_route("inverse")  # before what it would need is missed
        arrays, restore = self._received({"image": images, **(conditions or {})})
        pixels = as_pixels(arrays.pop("image"), self.resolution, self.channels)
        wanted = {name: (len(pixels), len(options)) for name, options in self.conditions.items()}
        floats = ("float32", "torch.float32")
        given = {name: tuple(array.shape) for name, array in arrays.items() if str(array.dtype) in floats}
        if given != wanted or len(given) != len(arrays):
            needed, found = (
                ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
                for shapes in (wanted, {name: array.shape for name, array in arrays.items()})
            )
            raise DataError(f"beside images this model needs {needed}, float32 one-hot; received {found}")
        check_conditions(self.conditions, arrays)
        taken = {tensor.name for tensor in self.drawing.inputs("control", route="inverse")}
        standing = {name: value for name, value in self._chosen.items() if name in taken}
        beside = self._set({**standing, **(controls or {})}, pixels, "inverse")
        if posterior and self.drawing.beside("inverse") == self.drawing.beside("inverse", every=True):
            raise DataError(
                f"this {self.manifest.family} model has no posterior to draw latents from; omit 'posterior'"
            )
        drawn = self.drawing.noise(seed, range(first, first + len(pixels)), "inverse", posterior)
        beside |= {name: as_kind(pixels, values) for name, values in drawn.items()}
        grids = self.drawing.inputs("grid", route="inverse")
        beside |= {tensor.name: filled(pixels, (len(pixels), *tensor.shape), GRID) for tensor in grids}
        outputs = self.run("inverse", {"image": pixels, **arrays, **beside}, only) | arrays
        latents = {name: restore(outputs[name]) for name in self.input_shapes if name in outputs}
        return Encoded(latents, {name: restore(values) for name, values in outputs.items() if values.ndim == 1})

    def sample(
        self,
        n: int,
        std: Stds | None = None,
        seed: int = 0,
        *,
        option: str | None = None,
        controls: Mapping[str, float] | None = None,
        steps: int | None = None,
        pixels: bool = False,
    ) -> Array:
        """`n` images float32 `[n, C, R, R]`; image i depends on `seed` and i alone. Raises `DataError`.

        std: by default what the bundle says, `Session.std`. option: as of `draw`. controls: as of `forward`. steps: as
        of `in_steps`. pixels: as of `drawn_pixels`.

        >>> import hflow_rt
        >>> hflow_rt.load().sample(2, seed=1).shape
        (2, 3, 64, 64)
        """
        check_count("the number of images", n)
        session = self if steps is None else self.in_steps(steps)
        size = 4 * n * self.channels * self.resolution**2
        need(size, f"{n:,} images", "ask for fewer together, with `draw` and `forward`")
        parts: list[Array] = []
        for latents in session.draw(range(n), std, seed, option=option):
            if pixels:
                parts.append(session.drawn_pixels(latents, controls, seed=seed, first=sum(map(len, parts))))
            else:
                parts.append(session.forward(latents, controls))
        return np.concatenate(parts)

    def drawn_pixels(
        self, latents: Mapping[str, Any], controls: Mapping[str, float] | None = None, *, seed: int = 0, first: int = 0
    ) -> Any:
        """The images `first`, ... of `seed` for their latents, every pixel drawn from its distribution, not the mean.

        controls: as of `forward`. Raises `DataError` as it does, and where the model tells no distributions of pixels.
        """
        ways = [(space.into, space.draw) for space in self.manifest.spaces.values() if space.into and space.draw]
        if not ways:
            raise DataError(
                f"this {self.manifest.family} model tells no distributions to draw pixels from; omit 'pixels'"
            )
        ((into, draw),) = ways
        arrays, restore = self._checked(latents, controls)
        count = len(next(iter(arrays.values())))
        drawn = self.drawing.of(self._graph(draw).inputs, seed, range(first, first + count))
        kept = {name: as_kind(next(iter(arrays.values())), values) for name, values in drawn.items()}
        return restore(self.run_graph(draw, self.run_graph(into, arrays) | kept)["image"])

    def read(self, *paths: Path | str) -> Array:
        """Image files, and all images of folders, archives and arrays, as `inverse` takes them: `[B, C, R, R]`.

        Turned as their EXIF says, in sRGB (of a grey model, its luminance), the largest square in the middle, reduced
        to R. Raises `DataError` for a file that cannot be used, and warns of those in folders and archives.

        >>> import hflow_rt
        >>> hflow_rt.load().read("photo.png").shape
        (1, 3, 64, 64)
        """
        from hflow_rt.runtime.images.reading import read_pictures

        def warn(line: str) -> None:
            warnings.warn(line, stacklevel=4)

        return read_pictures([Path(path) for path in paths], self.resolution, note=warn, channels=self.channels)[1]

    def save(self, images: Any, path: Path | str) -> None:
        """Write images, as `forward` yields them: one as it is, several as a sheet, or as files if `path` is a folder.

        path: ends in .png, .jpg or .webp, or is a folder for 000000.png and so on. Raises `DataError` for another
        name, for a device, and for a picture too large for its format.

        >>> import hflow_rt
        >>> session = hflow_rt.load()
        >>> session.save(session.sample(4), "samples.png")
        """
        path = Path(path)
        destination(path)
        pixels = as_bytes(images)
        if path.suffix and len(pixels) == 1:
            save_image(path, to_picture(pixels[0]))
            return
        if not path.suffix:
            check_folder(path, range(len(pixels)))
        write_pictures(path, pixels)

    def draw(
        self,
        indices: Sequence[int],
        std: Stds | None = None,
        seed: int = 0,
        batch: int = 16,
        option: str | None = None,
        *,
        same_start: bool = False,
        share_noise: bool = False,
    ) -> Iterator[dict[str, Array]]:
        """What `forward` takes for the images `indices` of `seed`, at most `batch` at a time; latents are the prior's.

        std: by default what the bundle says, `Session.std`.
        Where the model has a choice, `option` makes it for all, else each option comes in turn.
        same_start: all have the latents of the first. share_noise: all have what is random beside latents of the first.
        """
        check_count("the batch", batch)
        if std not in (None, []) and not self.drawing.scaled:
            controls = f"; it has {', '.join(self.controls)} to set instead" if self.controls else ""
            raise DataError(f"no std applies to the latents of this {self.manifest.family} model; omit it{controls}")
        stds = parse_std(self.std if std is None else std, self.drawing.scaled)
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            alike = [indices[0]] * len(part)
            drawn = self.drawing.latents(seed, alike if same_start else part, stds)
            drawn |= self.drawing.noise(seed, alike if share_noise else part)
            conditions = (
                in_turn(self.conditions, part) if option is None else of_option(self.conditions, option, len(part))
            )
            yield drawn | conditions

    def into_space(self, space: str, latents: Mapping[str, Array]) -> dict[str, Array]:
        """Latents with those that have another form in `space` replaced by it; `z` is the latents themselves.

        Raises `DataError`.
        """
        shapes = self.space_shapes(space)
        check_latents(latents, self.input_shapes, "these latents")
        made = {} if space == LATENT_SPACE else self.run_graph(self._way(space, "into"), latents)
        return {name: made[name] if name in made else latents[name] for name in shapes}

    def from_space(self, space: str, values: Mapping[str, Array]) -> dict[str, Array]:
        """The inverse of `into_space`. Raises `DataError`, also for a space that leads to images only."""
        check_latents(values, self.space_shapes(space), f"these values of space {space}")
        made = {} if space == LATENT_SPACE else self.run_graph(self._way(space, "back"), values)
        return {name: made[name] if name in made else values[name] for name in self.input_shapes}

    def decode(self, space: str, values: Mapping[str, Array], controls: Mapping[str, float] | None = None) -> Any:
        """Images `[B, C, R, R]` in [0, 1] of what `into_space` yields; controls as of `forward`. Raises `DataError`."""
        found = None if space == LATENT_SPACE else self._space(space)
        if found is None or found.decode is None:
            return self.forward(self.from_space(space, values), controls)
        check_latents(values, self.space_shapes(space), f"these values of space {space}")
        taken = {tensor.name for tensor in self._graph(found.decode).inputs}
        known = {name: value for name, value in {**self._chosen, **(controls or {})}.items() if name in taken}
        inputs = {**values, **self._set(known, next(iter(values.values())))}
        return self.run_graph(found.decode, inputs)["image"]

    def check_controls(self, controls: Mapping[str, float]) -> None:
        """Raise `DataError` for a control that `forward` does not have, or a value that it cannot have."""
        self._set(controls, np.empty(0, np.float32))

    def _set(self, controls: Mapping[str, float], like: Any, route: Route = "forward") -> dict[str, Any]:
        """Controls as inputs, for as many images as `like` has. Raises `DataError` for an unknown or impossible one."""
        known = {tensor.name: tensor for tensor in self.drawing.inputs("control", route=route)}
        values = {}
        for name, value in controls.items():
            if name not in known:
                have = ", ".join(known) or "none"
                raise DataError(f"unknown control '{name}' of this {self.manifest.family} model; it has {have}")
            low, high = known[name].range or (-math.inf, math.inf)
            if not (low <= value <= high and math.isfinite(value)):
                raise DataError(f"control {name} must be a number in {low:g} .. {high:g}; found {value}")
            values[name] = filled(like, (len(like), *known[name].shape), value)
        return values

    def _received(self, arrays: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """The inputs as the engine takes them, and a function that gives results their kind and device."""
        if {library(array) for array in arrays.values()} == {"torch"}:
            check_tensors(arrays)
            if {str(tensor.device) for tensor in arrays.values()} == {self._engine.tensors}:
                return {name: tensor.detach() for name, tensor in arrays.items()}, lambda tensor: tensor
        return to_numpy(arrays)


def load(
    path: Path | str | None = None, backend: str = "onnx", device: str = "auto", *, cuda_graph: bool | None = None
) -> Session:
    """Open the bundle, or the exported run, at `path`; by default the bundled model. See `hflow_rt.load`.

    device: `onnx` also knows `ONNX_DEVICES`. Raises `BundleError` also for a run or a checkpoint that is none yet, with
    the command that makes it one.
    """
    from hflow_rt.assets import pretrained

    check_backend(backend, device)
    bundle = find_bundle(pretrained() if path is None else path)
    if bundle.outdated is not None:
        warnings.warn(bundle.outdated, stacklevel=2)
    return open_bundle(bundle, backend, device, cuda_graph=cuda_graph)


def open_bundle(bundle: Bundle, backend: str, device: str, *, cuda_graph: bool | None = None) -> Session:
    """`load` for a bundle that was found already."""
    import importlib

    if cuda_graph is not None and backend == "torch":
        raise BackendUnavailable("the torch backend has no CUDA graph; use trt or onnx")
    module = importlib.import_module(BACKENDS[backend][0])
    settings = {} if cuda_graph is None else {"cuda_graph": cuda_graph}
    return Session(bundle, module.open_engine(bundle, device, **settings))
