"""What the page can ask of a model, without the web around it; results are bytes and JSON values."""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.conditions import in_turn, of_option
from hflow_rt.errors import DataError
from hflow_rt.manifest import LOG_PROB
from hflow_rt.runtime.explore.recipes import Kept, Recipe, Shelf, cook, images, parts_of
from hflow_rt.runtime.images.pictures import coloured, heat_colours, image_of_bytes, to_uint8
from hflow_rt.runtime.images.video import save_animation
from hflow_rt.runtime.latents.attributes import measure_attribute, save_attribute
from hflow_rt.runtime.latents.files import about_model, latents_file
from hflow_rt.runtime.latents.latent_views import heat_map
from hflow_rt.runtime.latents.nearest import find_tensor, points
from hflow_rt.runtime.latents.operations import concatenate
from hflow_rt.runtime.latents.round_trips import encoded
from hflow_rt.runtime.session import LATENT_SPACE, Array, Session

__all__ = ["Studio"]

_REDRAWS = 16  # of a heat map: half of what the command takes, for somebody waits
_FRAMES = 48  # of an animation of a picture that comes to be
_ENLARGED = 256  # pixels a side at least of an animation


class Studio:
    """A session, and what people have given it."""

    def __init__(self, session: Session) -> None:
        self.session, self.shelf = session, Shelf()

    def set(self, controls: Mapping[str, float], steps: int | None) -> Session:
        """The session with these controls, in so many steps. Raises `DataError`."""
        session = self.session if steps is None or steps == self.session.steps else self.session.in_steps(steps)
        return session.with_controls(controls)

    def images(self, session: Session, recipes: Sequence[Recipe]) -> bytes:
        """The pictures, `[n, R, R, 3]` as bytes. Raises `DataError`."""
        return b"".join(_rgb(to_uint8(part)) for part in images(session, self.shelf, recipes))

    def trajectory(self, session: Session, recipe: Recipe) -> bytes:
        """How a picture comes to be, `[steps, R, R, 3]` as bytes. Raises `DataError`."""
        return b"".join(_rgb(frame) for frame in self._trajectory(session, recipe))

    def animation(self, session: Session, recipes: Sequence[Recipe], on_the_way: bool, fps: float) -> bytes:
        """A .gif of the pictures, or of how the first comes to be. Raises `DataError`."""
        if on_the_way:
            way = np.concatenate(self._trajectory(session, recipes[0]))
            frames = way[np.linspace(0, len(way) - 1, min(len(way), _FRAMES)).round().astype(int)]
        else:
            frames = np.concatenate([to_uint8(part) for part in images(session, self.shelf, recipes)])
        scale = -(-_ENLARGED // session.resolution)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "animation.gif"
            save_animation(file, frames.repeat(scale, 1).repeat(scale, 2), fps)
            return file.read_bytes()

    def heat(self, session: Session, recipe: Recipe, name: str) -> tuple[bytes, float]:
        """Where latent `name` decides the picture, `[R, R, 3]` as bytes, and the largest std. Raises `DataError`."""
        made = cook(session, self.shelf, recipe)
        if made.space != LATENT_SPACE or name not in session.levels:
            raise DataError(f"this picture has no latent '{name}' to redraw")
        first = 1 + max([recipe.image, *recipe.redrawn.values()])  # none is its own redraw
        heat = heat_map(session, made.values, name, _REDRAWS, seed=recipe.seed, first=first)
        top = float(heat.max())
        return heat_colours(heat / (top or 1.0)).tobytes(), top

    def latents(self, session: Session, recipes: Sequence[Recipe], controls: Mapping[str, float]) -> bytes:
        """A latents file of the pictures, which `decode`, `interpolate` and others take. Raises `DataError`."""
        parts = list(parts_of(session, self.shelf, recipes))
        if len({space for space, _ in parts}) > 1:
            raise DataError("these pictures are known in different spaces; save them one by one")
        about: dict[str, Any] = about_model(session) | ({"controls": dict(controls)} if controls else {})
        about |= {} if session.steps == self.session.steps else {"steps": session.steps}
        about |= {} if parts[0][0] == LATENT_SPACE else {"space": parts[0][0]}
        return latents_file(concatenate([values for _, values in parts]), about)

    def encode(self, session: Session, data: bytes, name: str, label: str | None) -> dict[str, Any]:
        """Keep the picture that these bytes of a file are, encoded; what the page is told of it. Raises `DataError`."""
        pixels = self._pixels(data, name)
        conditions = self._conditions(label)
        found = encoded(session, pixels, conditions)
        scores = {score: float(values[0]) for score, values in found.scores.items()}
        told = {"bits_per_dim": float(session.bits_per_dim(scores[LOG_PROB]))} if LOG_PROB in scores else {}
        return self._keep(Kept(LATENT_SPACE, found.latents), pixels) | told

    def project(
        self,
        data: bytes,
        name: str,
        label: str | None,
        steps: int,
        controls: Mapping[str, float],
        told: Callable[[dict[str, Any]], None],
        wanted: Callable[[], bool],
    ) -> dict[str, Any]:
        """As `encode`, by a search that `told` hears of and that ends where nobody `wanted` it any more."""
        import torch

        from hflow_rt.models.checkpoint import load_model
        from hflow_rt.projection.projecting import project, space_to_search

        pixels = self._pixels(data, name)
        model = load_model(self.session.bundle.model)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        space = space_to_search(model, None)
        conditions = self._conditions(label)
        way = project(model, pixels, space=space, steps=steps, conditions=conditions or None, controls=controls)
        for number, step in enumerate(way):
            if not wanted():
                raise DataError("the search was given up")
            told({"step": number + 1, "of": steps, "distance": float(step.distances.mean())})
        shapes = self.session.space_shapes(space)
        values = step.values | {key: rows for key, rows in conditions.items() if key in shapes}
        return self._keep(Kept(space, values), pixels) | {"distance": float(step.distances.mean())}

    def attribute(self, with_it: Sequence[str], without: Sequence[str]) -> dict[str, Any]:
        """Keep what sets two sets of kept pictures apart. Raises `DataError`."""
        session, where = self.session, find_tensor(self.session)
        sides = [
            np.concatenate([points(session, one.values, where, one.space) for one in map(self.shelf.picture, names)])
            if names
            else np.empty((0, 1), np.float32)
            for names in (with_it, without)
        ]
        found = measure_attribute(session, where, sides[0], sides[1], ("with it", "without it"))
        name = hashlib.sha256(found.vector.tobytes()).hexdigest()[:16]
        self.shelf.keep_attribute(name, found)
        about = found.about
        return {"attribute": name, "in": about.name, "apart": about.separation, "held_out": about.held_out_separation}

    def attribute_file(self, name: str) -> bytes:
        """A kept attribute as a file for `attribute apply`. Raises `DataError`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "attribute.safetensors"
            save_attribute(file, self.shelf.attribute(name))
            return file.read_bytes()

    def _trajectory(self, session: Session, recipe: Recipe) -> list[NDArray[np.uint8]]:
        made = cook(session, self.shelf, recipe)
        if session.steps == 1 or made.space != LATENT_SPACE:
            raise DataError("a trajectory needs a model of many steps; this one takes one")
        return [to_uint8(frame) for frame in session.trajectory(made.values)]

    def _pixels(self, data: bytes, name: str) -> Array:
        return image_of_bytes(data, name, self.session.resolution, self.session.channels)[None]

    def _conditions(self, label: str | None) -> dict[str, Array]:
        known = self.session.conditions
        return in_turn(known, [0]) if label is None else of_option(known, label, 1)

    def _keep(self, picture: Kept, pixels: Array) -> dict[str, Any]:
        levels = to_uint8(pixels)
        digest = hashlib.sha256(picture.space.encode())  # the same file has other values with other controls or steps
        for values in picture.values.values():
            digest.update(np.ascontiguousarray(values).tobytes())
        name = digest.hexdigest()[:16]
        self.shelf.keep(name, picture)
        return {"picture": name, "space": picture.space, "original": _rgb(levels).hex()}


def _rgb(levels: NDArray[np.uint8]) -> bytes:
    """uint8 `[B, R, R, C]` as bytes of three colours a pixel."""
    return np.ascontiguousarray(coloured(levels)).tobytes()
