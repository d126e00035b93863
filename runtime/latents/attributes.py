"""Attributes: the mean difference between the latents of two sets of images, to be added with a gain."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hflow_rt.errors import DataError
from hflow_rt.files import atomic_file, is_file
from hflow_rt.runtime.latents.nearest import TensorAddress
from hflow_rt.runtime.latents.operations import Latents
from hflow_rt.runtime.session import LATENT_SPACE, Array, Session

__all__ = [
    "About",
    "Attribute",
    "check_attribute",
    "load_attribute",
    "measure_attribute",
    "move",
    "parse_gains",
    "save_attribute",
]

# as files that people have name them
_METADATA_KEY = "hflow_rt.direction"
_TENSOR = "direction"
_TINY = 1e-30
_ROWS = 256  # pairs with so many images of one set at a time: thousands of images fit in memory
_MANY = 64  # gains, more than any strip shows
_NUMBER = r"[+-]?(?:\d{1,9}(?:\.\d*)?|\.\d+)"
_GAINS = re.compile(rf"({_NUMBER})(?::({_NUMBER}):(\d{{1,9}}))?")


class About(BaseModel):
    """What is known of an attribute. Separations are d': a distance of the two sets, in stds along its vector."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    family: str
    model: str  # sha256 of the weights
    space: str
    name: str
    positive: str  # where the images are from
    negative: str
    positives: int
    negatives: int
    norm: float
    separation: float  # of the images it was made of, hence too good: most of all for few images
    held_out_separation: float  # of one image of each set along the vector that all others make; 0 for noise

    @property
    def address(self) -> TensorAddress:
        """Where the attribute is added."""
        return TensorAddress(self.space, self.name)


@dataclass(frozen=True)
class Attribute:
    """`vector` `[*shape]` leads from the mean of the negative images to that of the positive ones."""

    vector: Array
    about: About


def measure_attribute(
    session: Session,
    address: TensorAddress,
    positive: Array,
    negative: Array,
    names: tuple[str, str] = ("positive", "negative"),
) -> Attribute:
    """The attribute from two sets of `points` `[N, D]` at `address`; `names` says what they are.

    Raises `DataError` for fewer than two images in a set, or sets without any difference or spread.
    """
    for name, points in zip(names, (positive, negative), strict=True):
        if len(points) < 2:
            raise DataError(f"an attribute needs at least 2 images on each side; {name} has {len(points)}; add some")
    a, b = positive.astype(np.float64), negative.astype(np.float64)
    difference = a.mean(0) - b.mean(0)
    norm = float(np.linalg.norm(difference))
    if norm == 0 or np.ptp(a, axis=0).max() == np.ptp(b, axis=0).max() == 0:
        raise DataError("the two sets need different means and different images within them; found none; choose others")
    line = difference / norm
    spread = float(np.sqrt(((a @ line).var(ddof=1) + (b @ line).var(ddof=1)) / 2))
    # sets without any spread along the vector are a million stds apart, not infinitely many: JSON has no infinity
    spread = max(spread, 1e-6 * norm)
    about = About(
        family=session.manifest.family,
        model=session.manifest.checkpoint["sha256"],
        space=address.space,
        name=address.name,
        positive=names[0],
        negative=names[1],
        positives=len(a),
        negatives=len(b),
        norm=norm,
        separation=norm / spread,
        held_out_separation=_held_out_distance(a, b) / spread,
    )
    vector = difference.reshape(session.space_shapes(address.space)[address.name])
    return Attribute(vector.astype(np.float32), about)


def move(
    session: Session, values: Latents, attribute: Attribute, gain: float, space: str = LATENT_SPACE
) -> dict[str, Array]:
    """Values of the attribute's space with `gain` times its vector added; all that are not at its address stay.

    values: of `space`, which is the latents' own or that of the attribute. Raises `DataError` for another one, and if
    the attribute is of another model.
    """
    check_attribute(session, attribute)
    address = attribute.about.address
    if space not in (LATENT_SPACE, address.space):
        raise DataError(f"the attribute is in space {address.space}, which nothing leads to from space {space}")
    moved = dict(values) if space == address.space else session.into_space(address.space, values)
    moved[address.name] = moved[address.name] + np.float32(gain) * attribute.vector
    return moved


def check_attribute(session: Session, attribute: Attribute, what: str = "the attribute") -> None:
    """Raise `DataError` unless `attribute` was measured on the weights of `session`."""
    model = session.manifest.checkpoint["sha256"]
    if attribute.about.model != model:
        raise DataError(
            f"{what} is of another model (weights {attribute.about.model[:12]}..., not {model[:12]}...); "
            "make one with 'hflow-rt attribute make'"
        )
    shape = session.space_shapes(attribute.about.space).get(attribute.about.name)
    if shape != attribute.vector.shape:
        raise DataError(f"{what} must be of shape {shape} in {attribute.about.name}, not {attribute.vector.shape}")


def save_attribute(path: Path | str, attribute: Attribute) -> None:
    """Write an attribute as safetensors. Raises `DataError` if the file cannot be written."""
    content = save(
        {_TENSOR: np.ascontiguousarray(attribute.vector)}, {_METADATA_KEY: attribute.about.model_dump_json()}
    )
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def load_attribute(path: Path | str) -> Attribute:
    """Read what `save_attribute` wrote. Raises `DataError` for a missing or broken file and for any other."""
    path = Path(path)
    if not is_file(path):
        raise DataError(f"no attribute at {path}; make one with 'hflow-rt attribute make'")
    try:
        with safe_open(path, "np") as file:
            header = (file.metadata() or {}).get(_METADATA_KEY)
            if header is None:
                raise DataError(f"{path} holds no attribute; give a file written by 'hflow-rt attribute make'")
            about = About.model_validate(json.loads(header))
            vector = file.get_tensor(_TENSOR)
        if vector.dtype != np.float32 or not np.isfinite(vector).all():
            raise ValueError("its values are not finite float32")
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DataError(f"{path} is not an attribute of this version ({where}); make it again") from error
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is not a whole attribute ({reason}); make it again") from error
    return Attribute(vector, about)


def parse_gains(texts: Iterable[str], what: str = "gain") -> list[float]:
    """Gains named as `1.5`, `FROM:TO:COUNT` (both ends included), or several of these with commas between.

    what: the numbers are, if not gains. Raises `DataError` for anything else, for none and for more than 64.
    """
    gains: list[float] = []
    for text in (part.strip() for words in texts for part in words.split(",")):
        match = _GAINS.fullmatch(text)
        if match is None or match[3] in ("0", "1"):
            raise DataError(f"a {what} is a number, or FROM:TO:COUNT such as -2:2:5; found '{text}'")
        count = int(match[3] or 1)
        if len(gains) + count > _MANY:
            raise DataError(f"at most {_MANY} {what}s fit a picture; '{text}' goes beyond; name fewer")
        gains += np.linspace(float(match[1]), float(match[2] or match[1]), count).tolist()
    if not gains:
        raise DataError(f"at least one {what} must be named, e.g. -2:2:5; found none")
    return gains


def _held_out_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """How far an image of `a` `[N, D]` is past one of `b` `[M, D]` along the vector that all others make.

    The mean over all N x M pairs. The vector knows neither of the two images, so that for sets without a
    difference each side is as likely to be ahead, and the mean is 0, whatever the sizes of the sets.
    """
    middle = (a.mean(0) + b.mean(0)) / 2  # moves no distance, and products of small numbers keep their digits
    a, b = a - middle, b - middle
    others_a, others_b = _means_of_others(a), _means_of_others(b)
    total = 0.0
    for start in range(0, len(a), _ROWS):
        rows, others = a[start : start + _ROWS], others_a[start : start + _ROWS]
        # (a_i - b_j) . (others_i - others_j) and |others_i - others_j|^2, both [rows, M]
        past = (rows * others).sum(1)[:, None] + (b * others_b).sum(1) - rows @ others_b.T - others @ b.T
        lengths = (others**2).sum(1)[:, None] + (others_b**2).sum(1)
        squares = lengths - 2 * others @ others_b.T
        # where the others have one mean there is no vector, only rounding, which must not be blown up
        total += float((past / np.sqrt(np.maximum(squares, 1e-12 * lengths + _TINY))).sum())
    return total / (len(a) * len(b))


def _means_of_others(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[N, D]`: in row i the mean of all points but point i."""
    means: NDArray[np.float64] = (points.sum(0) - points) / (len(points) - 1)
    return means
