"""An image's own colours as sRGB, which the colour profile embedded in a file explains, and these as grey."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

__all__ = ["luminance", "to_srgb"]

# the colour space of a profile: the mode that it converts from, and the modes of images that it can belong to
_MODES = {
    "RGB ": ("RGB", {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa"}),
    "GRAY": ("L", {"1", "L", "LA"}),
    "CMYK": ("CMYK", {"CMYK"}),
    "Lab ": ("LAB", {"LAB"}),
}
# Profiles of sRGB differ from one another by rounding of their curves.
_SAME = 1


class _Conversion(NamedTuple):
    mode: str
    modes: set[str]
    transform: ImageCms.ImageCmsTransform


def to_srgb(image: Image.Image) -> Image.Image:
    """An 8-bit image of any mode as RGB, or RGBA where it has transparency, relative colorimetric.

    The embedded profile decides. Without one, or if it cannot be read or belongs to images of another kind,
    the numbers are taken as sRGB. Transparency is not converted.
    """
    transparent = image.has_transparency_data
    plain = image.convert("RGBA" if transparent else "RGB")
    profile = image.info.get("icc_profile")
    conversion = _conversion(profile) if profile else None
    if conversion is None or image.mode not in conversion.modes:
        return plain
    # from the image itself, because plain has lost the inks of CMYK
    colours = (plain if conversion.mode == "RGB" else image).convert(conversion.mode)
    converted = conversion.transform.apply(colours)
    if transparent:
        converted.putalpha(plain.getchannel("A"))
    return converted


def luminance(image: Image.Image) -> Image.Image:
    """An RGB image as grey: `0.299 R + 0.587 G + 0.114 B` of 8-bit values, rounded, so that grey stays as it is."""
    return image.convert("L")


@lru_cache(maxsize=16)  # many images share a profile, and making a conversion takes longer than using it
def _conversion(profile: bytes) -> _Conversion | None:
    """How images with this profile become sRGB; None if they are sRGB, or if the profile cannot be read."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode, modes = _MODES[opened.profile.xcolor_space]
        target = ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.ImageCmsTransform(opened, ImageCms.ImageCmsProfile(target), mode, "RGB", intent)
    except (OSError, ValueError, KeyError):
        return None
    return None if _is_identity(transform, mode) else _Conversion(mode, modes, transform)


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether all greys and a lattice of colours stay as they are."""
    if mode not in ("L", "RGB"):
        return False
    greys = np.arange(256, dtype=np.uint8)
    sample = greys[None]
    if mode == "RGB":
        lattice = np.stack(np.meshgrid(*[greys[::15]] * 3), axis=-1).reshape(-1, 3)
        sample = np.concatenate([greys[:, None].repeat(3, 1), lattice])[None]
    image = Image.fromarray(sample)
    before, after = (np.asarray(one.convert("RGB")).astype(int) for one in (image, transform.apply(image)))
    return bool(np.abs(after - before).max() <= _SAME)
