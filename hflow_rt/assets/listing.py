"""What the bundled models are, from their manifests and cards."""

import re
from dataclasses import dataclass

from hflow_rt.assets import bundled_models, pretrained
from hflow_rt.manifest import read_manifest
from hflow_rt.names import image_size

__all__ = ["BundledModel", "listing"]


@dataclass(frozen=True)
class BundledModel:
    """bytes: of its folder. about: the first sentence of its card."""

    name: str
    family: str
    resolution: int
    channels: int
    parameters: int
    bytes: int
    about: str

    @property
    def size(self) -> str:
        """Of its images, for people."""
        return image_size(self.resolution, self.channels)


def listing() -> list[BundledModel]:
    """All of them, by name."""
    return [_described(name) for name in bundled_models()]


def _described(name: str) -> BundledModel:
    folder = pretrained(name)
    manifest = read_manifest(folder)
    card = folder.with_suffix(".md").read_text(encoding="utf-8")
    parameters = re.search(r"^\| parameters \| ([\d,]+) \|$", card, re.MULTILINE)
    about = re.search(rf"^# {name}\n\n(.+?\.)\s", card, re.DOTALL)
    assert parameters is not None
    assert about is not None
    return BundledModel(
        name,
        manifest.family,
        manifest.resolution,
        manifest.channels,
        int(parameters[1].replace(",", "")),
        sum(path.stat().st_size for path in folder.iterdir()),
        " ".join(about[1].split()),
    )
