"""Finding a bundle on disk and refusing one that is not what was exported."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hflow_rt.assets import PRETRAINED, bundled_models, pretrained, resolved
from hflow_rt.errors import BundleError, CheckpointError
from hflow_rt.files import exists, is_file, is_ours, sha256
from hflow_rt.manifest import MANIFEST, MODEL, Manifest, read_manifest
from hflow_rt.names import quoted
from hflow_rt.runs import ROOT, latest_run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BUNDLE", "REPORT", "Bundle", "chosen_model", "find_bundle"]

BUNDLE = "bundle"  # folder of a run that export writes
REPORT = ("latency.json", "latency.md", "latency.png")  # what bench adds to a bundle


@dataclass(frozen=True)
class Bundle:
    """A folder with its parsed manifest."""

    path: Path
    manifest: Manifest
    outdated: str | None = None  # a line about the newer weights of the run it was found by

    def file(self, name: str, again: str = "'hflow-rt export'") -> Path:
        """Path of a bundled file whose bytes are what the manifest says.

        Raises `BundleError`, which says to run `again` what makes it.
        """
        expected = self.manifest.files.get(name)
        path = self.path / name
        if expected is None or not is_file(path):
            raise BundleError(f"{self.path} has no {name}; export again with {again}")
        size = path.stat().st_size
        if size != expected.bytes:
            raise BundleError(
                f"{path} must be {expected.bytes} bytes, not {size}: it was cut or replaced; export again with {again}"
            )
        found = sha256(path)
        if found != expected.sha256:
            digests = f"sha256 {found[:12]}…, not {expected.sha256[:12]}…"
            raise BundleError(f"{path} was changed after export ({digests}); export again with {again}")
        return path

    def graph(self, name: str) -> Path:
        """Path of the ONNX file of a graph, its constants checked too. Raises `BundleError` where there is none."""
        if name not in self.manifest.graphs:
            have = ", ".join(self.manifest.graphs) or "none"
            raise BundleError(f"{self.path} has no '{name}' engine (it has: {have}); export it with 'hflow-rt export'")
        graph = self.manifest.graphs[name]
        for file in graph.weights:
            self.file(file)
        return self.file(graph.file)

    def made_of(self, weights: Path) -> bool:
        """Whether it was exported from the model file `weights`, as that is now."""
        checkpoint = self.manifest.checkpoint
        return sha256(weights) in (checkpoint["sha256"], checkpoint.get("exported_from"))

    def table(self, name: str) -> "dict[str, NDArray[np.float32]]":
        """The arrays of a bundled safetensors file by name, float32. Raises as `file` does."""
        import numpy as np
        from safetensors.numpy import load_file

        return {key: np.asarray(array, np.float32) for key, array in load_file(self.file(name)).items()}

    @property
    def model(self) -> Path:
        """The reference weights."""
        return self.file(MODEL)


def chosen_model(model: Path | None) -> tuple[Path, str]:
    """What a command takes for the model, and a line on what that is where it may be another than people think.

    model: a path or the name of a bundled model; None for the latest run under ./runs, or else the bundled model.
    """
    if model is not None:
        found = resolved(model)
        if str(model) not in bundled_models():
            return found, ""
        return found, f"{model} is the bundled model" if found != model else f"{model} is the one in this folder"
    try:
        return latest_run(), ""
    except CheckpointError:
        return pretrained(), f"no run under ./{ROOT}: this is {PRETRAINED}, the bundled model"


def find_bundle(path: Path | str) -> Bundle:
    """The bundle at `path`, which may also be a run that was exported, or the name of a bundled model.

    One of a run may be `outdated`. Raises `BundleError`, and `DataError` for a path that cannot be asked.
    """
    path = resolved(Path(path))
    if not exists(path):
        raise BundleError(f"{path} does not exist; name a run, a bundle or one of {', '.join(bundled_models())}")
    if is_file(path / MANIFEST):
        return Bundle(path, read_manifest(path))
    if is_file(path) and not is_ours(path):
        raise BundleError(
            f"{path} is no run or bundle; if it is a published checkpoint, run 'hflow-rt import {quoted(path)}' first"
        )
    again = f"hflow-rt export {quoted(path)}"
    if not is_file(path / BUNDLE / MANIFEST):
        raise BundleError(f"{path} has no exported bundle; run '{again}' first")
    found = Bundle(path / BUNDLE, read_manifest(path / BUNDLE))
    if is_file(path / MODEL) and not found.made_of(path / MODEL):
        return replace(found, outdated=f"{found.path} is of other weights than {path} has now; run '{again}'")
    return found
