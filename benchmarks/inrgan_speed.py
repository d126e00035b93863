"""INR-GAN's forward pass in float32: the exported graph against the plain generator, eager and compiled.

    python benchmarks/inrgan_speed.py [--presets inrgan-emoji inrgan-256] [--batches 1 16] [--out FILE.md]

The plain generator concatenates and computes its embeddings anew in every call. All take turns on the same latents.
Then the peak memory that one call of each adds, an image, in processes of their own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import take_turns

from hflow_rt.export.bundle import export_bundle
from hflow_rt.models.checkpoint import build_model, save_model
from hflow_rt.models.registry import family
from hflow_rt.runtime import load

VARIANTS = ("eager", "compiled", "onnx")
WANTED = {"eager": 3.0, "compiled": 1.5}


def made(preset: str, folder: Path) -> Path:
    """A bundle of random weights, with w_avg as a trained one has it."""
    torch.manual_seed(0)
    model: Any = build_model("inrgan", family("inrgan").presets[preset]["model"])
    with torch.no_grad():
        model.w_avg.copy_(model.mapping(torch.randn(1000, model.config.z_dim)).mean(0))
    save_model(folder / "model.safetensors", "inrgan", model, model.state_dict(), {})
    side = model.resolution
    export_bundle(folder / "model.safetensors", folder / "bundle", np.zeros((1, 3, side, side), np.float32))
    return folder


def call_of(variant: str, folder: Path, batch: int) -> Callable[[], Any]:
    """One forward pass of `batch` images."""
    session = load(folder, "onnx" if variant == "onnx" else "torch", "cpu")
    (latents,) = session.draw(range(batch), batch=batch)
    if variant == "onnx":
        return lambda: session.forward(latents)
    from hflow_rt.models.checkpoint import load_model

    model: Any = load_model(folder / "model.safetensors")
    plain = model.graphs()["forward"].reference
    plain = torch.compile(plain) if variant == "compiled" else plain
    slots = float(model.config.slots)
    inputs = torch.from_numpy(latents["z"]), torch.full((batch,), model.config.psi), torch.full((batch,), slots)

    def call() -> Any:
        with torch.inference_mode():
            return plain(*inputs)

    return call


def peak_of(variant: str, folder: Path, batch: int) -> float:
    """MiB an image that a second call adds to what the process had before its first."""
    call = call_of(variant, folder, batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["inrgan-emoji", "inrgan-256"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(peak_of(*json.loads(given.one)))
        return
    lines = ["| preset | batch | | images/s | of onnx, wanted | MiB an image |", "|---|---:|---|---:|---|---:|"]
    with tempfile.TemporaryDirectory() as work:
        for preset in given.presets:
            folder = made(preset, Path(work) / preset)
            for batch in given.batches:
                seconds = take_turns({name: call_of(name, folder, batch) for name in VARIANTS}, given.rounds, fill=1.0)
                best = {name: statistics.median(found) for name, found in seconds.items()}
                for name in VARIANTS:
                    job = [sys.executable, __file__, "--one", json.dumps([name, str(folder), batch])]
                    peak = float(subprocess.run(job, check=True, capture_output=True, text=True).stdout)
                    ratio = f"{best[name] / best['onnx']:.2f}x" + (f", {WANTED[name]}x" if name in WANTED else "")
                    lines.append(f"| {preset} | {batch} | {name} | {batch / best[name]:.1f} | {ratio} | {peak:.1f} |")
                    print(lines[-1], file=sys.stderr)
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
