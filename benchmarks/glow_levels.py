"""What float32 loses in each level of Glow: its round trip, and its log-determinant against float64.

    python benchmarks/glow_levels.py [--preset glow-64] [--model MODEL.safetensors] [--out FILE.md]

Each level gets, in float32, the input that the float64 model has there, so that errors do not add up over levels; the
images are emoji that ship, or those of --images.
"""

import argparse
import copy
from pathlib import Path

import torch
from measuring import trained_like
from torch.nn import functional as F

from hflow_rt.models.bins import to_model
from hflow_rt.models.checkpoint import load_model


def main() -> None:
    from hflow_rt.export.making import proof_pictures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="glow-64")
    parser.add_argument("--model", type=Path, help="trained weights instead of `trained_like`")
    parser.add_argument("--images", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    single = (trained_like(given.preset) if given.model is None else load_model(given.model)).float().eval()
    double = copy.deepcopy(single).double()
    pixels = torch.from_numpy(proof_pictures(given.images, single.resolution))[:2].double()
    x = to_model(pixels, single.config.bits)
    lines = ["| level | values | round trip, largest | log-det | its error | share |", "|---|---|---:|---:|---:|---:|"]
    with torch.no_grad():
        for index, (level, exact) in enumerate(zip(single.levels, double.levels, strict=True)):
            h = F.pixel_unshuffle(x, 2)
            found, true = level.chain.inverse(h.float()), exact.chain.inverse(h)
            trip = (level.chain(found.value).value - h.float()).abs().max() / h.abs().max().clamp_min(1)
            off = (found.log_det.double() - true.log_det).abs().max()
            shape = "x".join(map(str, h.shape[1:]))
            values = f"{trip:.1e} | {true.log_det.abs().max():.0f} | {off:.1e} | {off / true.log_det.abs().max():.1e}"
            lines.append(f"| {index} | {shape} | {values} |")
            x = true.value.chunk(2, 1)[0]
    table = "\n".join(lines)
    print(table)
    if given.out is not None:
        given.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
