"""Finding a bundle on disk and refusing one that is not what was exported."""

from dataclasses import dataclass
from pathlib import Path

from hflow_rt.errors import BundleError
from hflow_rt.files import sha256
from hflow_rt.manifest import MANIFEST, MODEL, Manifest, read_manifest

__all__ = ["BUNDLE", "Bundle", "find_bundle"]

BUNDLE = "bundle"  # folder of a run that export writes


@dataclass(frozen=True)
class Bundle:
    """A folder with its parsed manifest."""

    path: Path
    manifest: Manifest

    def file(self, name: str, again: str = "'hflow-rt export'") -> Path:
        """Path of a bundled file whose bytes are what the manifest says.

        Raises `BundleError`, which says to run `again` what makes it.
        """
        expected = self.manifest.files.get(name)
        path = self.path / name
        if expected is None or not path.is_file():
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
        if graph.weights is not None:
            self.file(graph.weights)
        return self.file(graph.file)

    @property
    def model(self) -> Path:
        """The reference weights."""
        return self.file(MODEL)


def find_bundle(path: Path | str) -> Bundle:
    """The bundle at `path`, which may also be a run that was exported. Raises `BundleError`."""
    path = Path(path)
    if not path.exists():
        raise BundleError(f"{path} does not exist; name a run or a bundle")
    for folder in (path, path / BUNDLE):
        if (folder / MANIFEST).is_file():
            return Bundle(folder, read_manifest(folder))
    raise BundleError(f"{path} has no exported bundle; run 'hflow-rt export {path}' first")
