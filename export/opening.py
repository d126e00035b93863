"""`hflow_rt.load`: a session of whatever holds a model, made a bundle first where it is none."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from hflow_rt.assets import pretrained
from hflow_rt.errors import DataError
from hflow_rt.files import exists, is_file, is_folder, is_ours, sha256
from hflow_rt.manifest import MANIFEST, MODEL
from hflow_rt.runtime import session as runtime
from hflow_rt.runtime.bundle import BUNDLE, find_bundle
from hflow_rt.runtime.session import Session

__all__ = ["load"]


def load(
    path: Path | str | None = None,
    backend: str = "onnx",
    device: str = "auto",
    *,
    family: str | None = None,
    settings: Path | str | None = None,
    resolution: int | None = None,
    region: Sequence[float] | None = None,
    cuda_graph: bool | None = None,
) -> Session:
    """Open a bundle, a run, a model file or a published checkpoint; by default the bundled model, which draws emoji.

    A run that has no bundle is exported, as `hflow-rt export` does; a file is exported, a published one imported
    before that, into the user's cache, where it stays. Both take a while, need `hflow-rt[train]`, and warn. family,
    settings: as of `hflow-rt import`, for a published checkpoint. backend: `onnx`, `trt` or `torch`. device: `cpu`,
    `cuda`, or `auto` for the best that works. cuda_graph: whether the work is replayed as one CUDA graph; by default
    `trt` does and `onnx` does not. resolution, region: of the images of a model that knows more of them than their
    pixels, such as 512 and (0.25, 0.25, 0.75, 0.75) for what is in the middle, larger; exported once, beside the
    bundle.

    Raises `BundleError` for a missing or changed bundle, `CheckpointError` and `ConfigError` for a file that holds no
    model, `EngineMismatch` for engines of another machine and `BackendUnavailable` for a backend or device that is not
    there; there is no fallback. Warns where the weights of a run are newer than its bundle.

    >>> import hflow_rt
    >>> hflow_rt.load(backend="onnx", device="cpu")
    <Session: ... 64x64 on onnxruntime CPUExecutionProvider, verified
     latents ...>
    """
    if path is not None:
        path = _bundle_of(Path(path), family, None if settings is None else Path(settings))
    if resolution is not None or region is not None:
        from hflow_rt.export.making import nobody, typed_region, viewed

        bundle = find_bundle(pretrained() if path is None else path)
        path = viewed(bundle, resolution, typed_region(region), nobody).path
    return runtime.load(path, backend, device, cuda_graph=cuda_graph)


def _bundle_of(path: Path, family: str | None, settings: Path | None) -> Path:
    """What `runtime.load` opens: the path itself where it holds a bundle, or nothing at all."""
    from hflow_rt.export.public import export

    if not exists(path) or is_file(path / MANIFEST) or is_file(path / BUNDLE / MANIFEST):
        return path
    if is_folder(path):
        if is_file(path / MODEL):
            warnings.warn(f"{path} has no bundle yet: exporting it", stacklevel=3)
            export(path)
        return path
    run = _cache() / sha256(path)[:24]
    if not is_file(run / BUNDLE / MANIFEST):
        warnings.warn(f"{path} is no bundle: making one in {run}", stacklevel=3)
        if is_ours(path):
            export(path, out=run / BUNDLE)
        else:
            from hflow_rt.extras import need_extra

            need_extra("train", "torch", what="importing")
            from hflow_rt.foreign.importing import import_published

            if not is_file(run / MODEL):
                import_published(path, family, run, settings)
            export(run)
    return run


def _cache() -> Path:
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("hflow-rt", appauthor=False)) / "imported"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can") from error
    return folder
