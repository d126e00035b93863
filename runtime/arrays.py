"""Arrays of numpy or torch, whichever came; torch is imported only where its tensors have."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hflow_rt.errors import DataError
from hflow_rt.manifest import Tensor
from hflow_rt.runtime.images.pictures import check_pixels, from_uint8, to_uint8
from hflow_rt.runtime.noise import Stream

__all__ = [
    "as_bytes",
    "as_kind",
    "as_pixels",
    "check_tensors",
    "concatenated",
    "filled",
    "given",
    "library",
    "stacked",
    "to_numpy",
]

_MEANS = {"noise": 0.0, "uniform": 0.5}


def library(array: Any) -> str:
    """`numpy` or `torch`, or where else the array is from."""
    return type(array).__module__.partition(".")[0]


def as_kind(like: Any, array: Any) -> Any:
    """An array as a tensor where `like` is one, on its device."""
    if library(like) != "torch" or library(array) == "torch" or isinstance(array, Stream):
        return array
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)


def filled(like: Any, shape: tuple[int, ...], value: float | None) -> Any:
    """A float32 array, or a tensor where `like` is."""
    return like.new_full(shape, value) if library(like) == "torch" else np.full(shape, value, np.float32)


def given(tensor: Tensor, values: Mapping[str, Any], count: int) -> Any:
    """An input by name; where nobody gave it, its default, else of noise the mean. Raises `DataError`."""
    if tensor.name in values:
        return values[tensor.name]
    unset = _MEANS.get(tensor.role) if tensor.default is None else tensor.default
    if unset is None:
        raise DataError(f"'{tensor.name}' [B, {', '.join(map(str, tensor.shape))}] is needed and was not given")
    return filled(next(iter(values.values())), tensor.batched(count), unset)


def concatenated(parts: Sequence[Any]) -> Any:
    """Arrays of one library, one after the other."""
    if library(parts[0]) == "torch":
        import torch

        return torch.cat(list(parts))
    return np.concatenate(parts)


def stacked(parts: Sequence[Any]) -> Any:
    """Arrays `[B, *shape]` of one library as `[B, len(parts), *shape]`."""
    if library(parts[0]) == "torch":
        import torch

        return torch.stack(list(parts), 1)
    return np.stack(parts, 1)


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Raise `DataError` for a type of torch that is not among those that come in."""
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in ("torch.float32", "torch.uint8"):  # numpy has no bfloat16
            raise DataError(f"'{name}' must be float32 (pixels may be uint8), not {tensor.dtype}")


def to_numpy(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Numpy views of the inputs, and a function that gives results the kind and device of the first input.

    Raises `DataError` for a mixture, and for anything else.
    """
    kinds = {type(array).__name__: library(array) for array in arrays.values()}
    if all(isinstance(array, np.ndarray | Stream) for array in arrays.values()):
        return dict(arrays), lambda array: array
    if set(kinds.values()) != {"torch"}:
        raise DataError(f"arrays must be all numpy or all torch, not {' and '.join(sorted(kinds))}")
    import torch

    device = next(iter(arrays.values())).device
    return {n: t.detach().cpu().numpy() for n, t in arrays.items()}, lambda a: torch.from_numpy(a).to(device)


def as_bytes(images: Any) -> Any:
    """Images float `[B, C, R, R]` in [0, 1] as numpy's uint8 `[B, R, R, C]`; tensors are rounded where they are.

    Raises `DataError` as `to_uint8` does.
    """
    if library(images) == "torch" and images.dim() == 4 and images.shape[1] in (1, 3):
        from hflow_rt.kernels.quantise import quantise

        if images.is_floating_point() and bool(images.isfinite().all()):
            return quantise(images.detach()).cpu().numpy()
    return to_uint8(to_numpy({"image": images})[0]["image"])


def as_pixels(images: Any, side: int, channels: int = 3) -> Any:
    """Images, uint8 `[B, R, R, C]` or float32 `[B, C, R, R]` in [0, 1], as the latter. Raises `DataError` for others.

    side: R. channels: C, 3 or 1; grey images may also be uint8 `[B, R, R]`.
    """
    given = list(images.shape)
    if str(images.dtype) in ("uint8", "torch.uint8"):
        if channels == 1 and images.ndim == 3:
            images = images[..., None]
        if library(images) == "torch":  # on a GPU
            images = images.permute(0, 3, 1, 2).float() / 255 if images.ndim == 4 else images
        else:
            check_pixels(images)
            images = from_uint8(images)
    if images.ndim != 4 or images.shape[1:] != (channels, side, side) or len(images) < 1:
        wanted = f"float32 [B, {channels}, {side}, {side}] or uint8 [B, {side}, {side}, {channels}]"
        raise DataError(f"images must be {wanted}, not {given}")
    if str(images.dtype) not in ("float32", "torch.float32"):
        raise DataError(f"images must be float32 in [0, 1] or uint8, not {images.dtype}")
    if not ((images >= 0) & (images <= 1)).all():  # NaN is neither
        raise DataError("images must lie in [0, 1]; found values outside, NaN or infinity")
    return images
