"""Does the proof of an export cry wolf, and what does it miss? Right and deliberately wrong engines of small models.

    python benchmarks/parity_study.py [--minutes 9] [--only KIND] [--work FOLDER]
    python benchmarks/parity_study.py --verify

Models of many shapes are trained for 0 to 60 steps from a seed of their own, exported, and proved. Then every second
one gets one fault after another (`parity_faults.py`) and is proved again. A run goes on where the last one stopped,
after --minutes at the latest; what was measured lies in --work, and judging it anew with other factors takes a second.
The table is printed and written to results/parity_study.md.

The exporter traces a shape once; further models of that shape are that graph with their weights, optimised as ever.
--verify exports one small model of each family in both ways and compares the graphs.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir
import torch
from measuring import RESULTS
from parity_faults import IN_GRAPH, IN_MODEL, MATTERS, faults, state

from hflow_rt.assets import demo_images
from hflow_rt.data.dataset import ImageSet, open_dataset
from hflow_rt.export import judging, parity
from hflow_rt.export.bundle import export_bundle
from hflow_rt.files import atomic_file, sha256
from hflow_rt.manifest import MANIFEST, BundledFile, read_manifest
from hflow_rt.models.checkpoint import build_model, load_model, save_model
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.session import open_bundle
from hflow_rt.training.config import RunConfig, load_config
from hflow_rt.training.trainer import train

Array = np.ndarray[Any, np.dtype[Any]]
_LEVEL: dict[str, Any] = {
    "resolution": 8, "channels": 4, "steps": 2, "split": "channels", "coupling_channels": 8, "noise": 0.2,
    "encoder_channels": 6, "decoder_channels": 8, "condition_channels": 4, "skip_channels": 3, "style": True,
    "norm": True,
}  # fmt: skip
_IMAGE: dict[str, Any] = {
    "resolution": 16, "channels": 3, "steps": 2, "split": "blocks-channels", "coupling_channels": 8,
    "encoder_channels": 6, "decoder_channels": 6, "condition_channels": 4,
}  # fmt: skip
_END: dict[str, Any] = {
    "channels": [2, 6], "condition_channels": [4], "steps": [2, 2], "coupling_channels": [8, 8],
    "hidden_from_style": [0, 2], "hidden_from_base": [0, 8],
}  # fmt: skip
_HFLOW = {"levels": [_IMAGE, _LEVEL], "end": _END, "style_channels": 8}
_GLOW: dict[str, Any] = {"resolution": 16, "levels": 2, "steps": 2, "hidden_channels": 16, "lu": True}
# kind: (preset whose training it gets, model settings or None for those of the preset, how many models)
KINDS: dict[str, tuple[str, dict[str, Any] | None, int]] = {
    "hflow-8": ("hflow-demo", _HFLOW | {"levels": [_IMAGE | {"resolution": 8, "steps": 4}]}, 16),
    "hflow-16": ("hflow-demo", _HFLOW, 16),
    "hflow-demo": ("hflow-demo", None, 2),
    "glow-8": ("glow-demo", _GLOW | {"resolution": 8}, 60),
    "glow-16": ("glow-demo", _GLOW, 30),
    "glow-additive": ("glow-demo", _GLOW | {"coupling": "additive"}, 30),
    "glow-repository": (
        "glow-demo",
        {"resolution": 16, "levels": 2, "steps": 2, "hidden_channels": 16, "edge": "ones", "hidden": "bias",
         "moving": "first", "scale": "exp_sigmoid", "split_prior": False, "top_prior": "fixed", "bits": 5},
        40,
    ),
    "glow-48-steps": ("glow-demo", {"resolution": 8, "levels": 2, "steps": 24, "hidden_channels": 8, "lu": True}, 10),
}  # fmt: skip
STEPS = (0, 1, 2, 3, 5, 7, 12, 20, 30, 45, 60)
BATCHES = (4, 8, 16)
PROOFS = (8, 3, 1)  # images of the proof


@dataclass(frozen=True)
class Subject:
    """One model of the study."""

    kind: str
    index: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.index:02d}"

    @property
    def steps(self) -> int:
        return 7 if self.name == "hflow-demo-00" else STEPS[self.index % len(STEPS)]

    @property
    def batch(self) -> int:
        """7 steps of 16 are the 112 images after which the demo was once called wrong."""
        return 16 if self.kind.endswith("demo") else BATCHES[self.index // 3 % len(BATCHES)]

    def config(self) -> RunConfig:
        preset, settings, _ = KINDS[self.kind]
        training = load_config(preset).training.model_dump()
        training |= {"batch_size": self.batch, "seed": self.index, "images": max(1, self.steps) * self.batch}
        training |= {"evaluate_images": 2, "warmup_images": 0 if self.index % 2 else training["warmup_images"]}
        model = load_config(preset).model.model_dump(mode="json") if settings is None else settings
        return load_config(file={"family": preset.split("-")[0], "model": model, "training": training})

    def weights(self, folder: Path) -> Path:
        """The trained model file."""
        config = self.config()
        data = _emoji(config.resolution)
        if self.steps:
            return train(config, data, folder / "run").run / "model.safetensors"
        torch.manual_seed(self.index)
        model = build_model(config.family, config.model)
        model.initialize(torch.from_numpy(data.pixels(np.arange(64))), torch.Generator().manual_seed(self.index))
        save_model(folder / "model.safetensors", config.family, model, model.state_dict(), {})
        return folder / "model.safetensors"

    def images(self) -> Array:
        """Of the proof, float32 `[N, 3, R, R]`."""
        data = _emoji(self.config().resolution)
        chosen = np.random.default_rng(self.index).permutation(len(data))[: PROOFS[self.index % len(PROOFS)]]
        return data.pixels(np.sort(chosen)).astype(np.float32) / 255


@cache
def _emoji(resolution: int) -> ImageSet:
    return open_dataset(demo_images(), resolution)


def subjects() -> list[Subject]:
    """All models, the kinds in turns."""
    every = [Subject(kind, index) for kind, (_, _, count) in KINDS.items() for index in range(count)]
    return sorted(every, key=lambda subject: subject.index / KINDS[subject.kind][2])


# -- exporting many models of one shape


class Tracer:
    """Stands in for `torch.onnx.export`: a graph that was traced before gets the weights of the module."""

    def __init__(self, folder: Path, shape: str) -> None:
        self.folder, self.shape, self.export = folder, shape, torch.onnx.export
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, module: torch.nn.Module, examples: Any, **options: Any) -> Any:
        key = f"{self.shape}/{type(module).__qualname__}/{options['input_names']}/{options['output_names']}"
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"
        if not path.exists():
            program: Any = self.export(module, examples, **options, optimize=False)
            with atomic_file(path) as file:
                onnx.save(program.model_proto, file)
        proto, tensors = onnx.load(path), state(module)
        for tensor in proto.graph.initializer:
            values = tensors[tensor.name]
            assert list(tensor.dims) == list(values.shape), tensor.name
            tensor.raw_data = values.tobytes()
        model = onnx_ir.serde.deserialize_model(proto)
        from torch.onnx._internal._lazy_import import onnxscript_apis

        return SimpleNamespace(model_proto=onnx_ir.serde.serialize_model(onnxscript_apis.optimize(model)))


def _tracer(subject: Subject, work: Path) -> Tracer:
    return Tracer(work / "traced", json.dumps(KINDS[subject.kind][:2]))


@contextmanager
def _remembering() -> Iterator[None]:
    """The reference of a model is computed once for all its engines."""
    known: dict[Any, Any] = {}
    run = parity._Pair._run

    def remembered(pair: Any, module: Any, dtype: Any, values: Any) -> Any:
        inputs = b"".join(values[tensor.name].tobytes() for tensor in pair.spec.inputs)
        key = (pair.spec.name, str(dtype), hashlib.sha256(inputs).hexdigest())
        if key not in known:
            known[key] = run(pair, module, dtype, values)
        return known[key]

    with mock.patch.object(parity._Pair, "_run", remembered):
        yield


# -- the study


def study(subject: Subject, work: Path) -> dict[str, Any]:
    """Reports of the right engines and of every fault."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        folder = Path(place)
        weights, images = subject.weights(folder), subject.images()
        with mock.patch("torch.onnx.export", _tracer(subject, work)), _remembering():
            manifest = export_bundle(weights, folder / "bundle", images, bound=subject.index % 4 < 2)
            assert manifest.parity is not None
            record = {"steps": subject.steps, "batch": subject.batch, "right": _kept(manifest.parity), "faults": {}}
            if subject.index % 2:  # faults cost five times what a right engine does
                return record
            model = load_model(weights).eval()
            specs = model.graphs()
            model.graphs = lambda: specs  # type: ignore[method-assign]  # folded once
            for name, change in faults(model, images, subject.index):
                shutil.copytree(folder / "bundle", folder / "faulty")
                effect = change(folder / "faulty")
                if effect is not None:
                    bundle = Bundle(folder / "faulty", trusted(folder / "faulty"))
                    with open_bundle(bundle, "onnx", "cpu") as session:
                        report = parity.run_parity(model, session, images)
                    record["faults"][name] = {"effect": effect, "report": _kept(report)}
                shutil.rmtree(folder / "faulty")
    return record


def _kept(report: dict[str, Any]) -> dict[str, Any]:
    return {"graphs": {}, "pooled": report["pooled"]}


def trusted(folder: Path) -> Any:
    """The manifest with the sums of the changed graphs."""
    manifest = read_manifest(folder)
    files = {
        name: BundledFile(sha256=sha256(folder / name), bytes=(folder / name).stat().st_size) for name in manifest.files
    }
    manifest = manifest.model_copy(update={"files": files})
    (folder / MANIFEST).write_text(manifest.dump())
    return manifest


def report(work: Path) -> str:
    """What the records say, judged by the tolerances of today."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted((work / "records").glob("*.json"))}
    for record in records.values():
        for found in (record["right"], *(fault["report"] for fault in record["faults"].values())):
            judging.set_tolerances(found)
    lines = [
        "# Does the proof of an export cry wolf, and what does it miss?",
        "",
        "Made by `python benchmarks/parity_study.py`; ONNX Runtime on one thread of a CPU against float64.",
        f"Factors {judging.FACTORS}, of fewer than {judging.FEW} values {judging.FACTORS_OF_FEW};"
        f" {judging.ULPS:g} ulp.",
        "",
        "## Right engines",
        "",
        "Largest share of a tolerance that any output took, by statistic; and how many would have failed the former",
        "rule, the largest error at most 4 times torch's plus 1e-6 of the scale.",
        "",
        "| models | exports | called wrong | rms | p99.9 | max | former rule |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    kinds = {kind: [r["right"] for name, r in records.items() if name.rsplit("-", 1)[0] == kind] for kind in KINDS}
    for kind, found in (kinds | {"all": [record["right"] for record in records.values()]}).items():
        if found:
            shares = " | ".join(f"{max(_share(one, s) for one in found):.0%}" for s in judging.STATISTICS)
            wrong, former = (sum(bool(judge(one)) for one in found) for judge in (judging.failures, _former))
            lines.append(f"| {kind} | {len(found)} | {wrong} | {shares} | {former} |")
    lines += [
        "",
        "## What the factors were chosen from",
        "",
        "Error of the engine over that of torch float32, of outputs",
    ]
    lines += [
        "whose torch error is more than an ulp of their size: below that, rounding the output itself decides.",
        "",
    ]
    lines += [
        "| values of the output | statistic | outputs | median | 99 % | 99.9 % | largest |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for low, high in ((1, 100), (100, judging.FEW), (judging.FEW, 10**9)):
        for statistic in judging.STATISTICS:
            ratios = np.array(list(_ratios(records, statistic, low, high)))
            if len(ratios):
                spread = " | ".join(f"{value:.2f}" for value in np.quantile(ratios, (0.5, 0.99, 0.999, 1)))
                values = f"{low} to {high - 1}" if high < 10**9 else f"{low} and more"
                lines.append(f"| {values} | {statistic} | {len(ratios)} | {spread} |")
    lines += [
        "",
        "## Deliberate faults",
        "",
        "Change: of the output that exact arithmetic changes most, relative, least and",
    ]
    lines += ["median over the engines. Excess: of its worst output over the tolerance, likewise. Changes below"]
    lines += [
        f"{MATTERS:.0e} are no faults; of 33 engines with a constant that changed 1e-5 to that, 31 were caught.",
        "",
    ]
    lines += [
        "| fault | engines | caught | change, least | median | excess, least | median |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for fault in (*IN_MODEL, *IN_GRAPH):
        found = [record["faults"][fault] for record in records.values() if fault in record["faults"]]
        if found:
            caught = sum(bool(judging.failures(one["report"])) for one in found)
            effects = [one["effect"] for one in found]
            excess = [max(_share(one["report"], s) for s in judging.STATISTICS) for one in found]
            change = "| | " if np.isnan(effects).any() else f"| {min(effects):.1e} | {np.median(effects):.1e} "
            lines.append(f"| {fault} | {len(found)} | {caught} {change}| {min(excess):.1f} | {np.median(excess):.0f} |")
    return "\n".join(lines) + "\n"


def _outputs(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for outputs in report["pooled"].values() for entry in outputs.values()]


def _share(report: dict[str, Any], statistic: str) -> float:
    """The largest error of an output over its tolerance; where that is 0, nothing was different."""
    judged = [entry for entry in _outputs(report) if statistic in entry["tolerance"]]
    return max(entry[statistic] / max(entry["tolerance"][statistic], 1e-30) for entry in judged)


def _former(report: dict[str, Any]) -> bool:
    return any(entry["max"] > 4 * entry["torch_float32_max"] + 1e-6 * entry["scale"] for entry in _outputs(report))


def _ratios(records: dict[str, Any], statistic: str, low: int, high: int) -> Iterator[float]:
    """Of the right engines' outputs with `low` values or more and fewer than `high`."""
    for record in records.values():
        for entry in _outputs(record["right"]):
            own, scale = entry[f"torch_float32_{statistic}"], entry[f"scale_{statistic}"]
            if low <= entry["elements"] < high and own > np.finfo(np.float32).eps * scale:
                yield entry[statistic] / own


def verify(work: Path) -> None:
    """A graph with the weights of another model is, but for the names it was given, what the exporter makes of it."""
    for kind in ("hflow-8", "glow-16"):
        subject = Subject(kind, KINDS[kind][2])  # one that is not in the study
        with tempfile.TemporaryDirectory(dir=work) as place:
            folder = Path(place)
            weights, images = subject.weights(folder), subject.images()
            export_bundle(weights, folder / "exported", images, bound=True)
            with mock.patch("torch.onnx.export", _tracer(subject, work)):
                export_bundle(weights, folder / "filled", images, bound=True)
            for path in sorted((folder / "exported").glob("*.onnx")):
                same = _nameless(path) == _nameless(folder / "filled" / path.name)
                print(subject.name, path.name, "the same" if same else "NOT THE SAME")


def _nameless(path: Path) -> list[Any]:
    """Nodes in order with their attributes; inputs as values of constants, or numbers in the order of appearance."""
    graph = onnx.load(path).graph
    known: dict[str, Any] = {t.name: (list(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in graph.initializer}
    for tensor in graph.input:
        known[tensor.name] = tensor.name
    nodes = []
    for node in graph.node:
        attributes = [attribute.SerializeToString() for attribute in node.attribute]
        nodes.append((node.op_type, attributes, [known.get(name) for name in node.input]))
        known |= {name: (len(nodes), index) for index, name in enumerate(node.output)}
    return [nodes, [(tensor.name, known[tensor.name]) for tensor in graph.output]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--work", type=Path, default=Path("build/parity_study"))
    parser.add_argument("--verify", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * given.minutes
    (given.work / "records").mkdir(parents=True, exist_ok=True)
    if given.verify:
        verify(given.work)
        return
    for subject in subjects():
        path = given.work / "records" / f"{subject.name}.json"
        if path.exists() or (given.only and subject.kind != given.only):
            continue
        if time.monotonic() > deadline:
            print("there is more to do: run this again")
            break
        started = time.monotonic()
        record = study(subject, given.work)
        with atomic_file(path) as file:
            file.write_text(json.dumps(record))
        missed = [name for name, found in record["faults"].items() if not judging.failures(found["report"])]
        wrong = judging.failures(record["right"])
        print(subject.name, f"{time.monotonic() - started:.1f} s, {wrong or 'right'}, missed {missed}", flush=True)
    text = report(given.work)
    print(text)
    with atomic_file(RESULTS / "parity_study.md") as file:
        file.write_text(text)


if __name__ == "__main__":
    main()
