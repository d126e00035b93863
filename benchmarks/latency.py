"""The latency reports that are kept: presets on every backend of a device, into benchmarks/results.

    python benchmarks/latency.py                      a CPU: hflow-demo, hflow-128, hflow-256, glow-64, batch 1 and 16
    python benchmarks/latency.py --device cuda        a GPU: hflow-128 and hflow-256, batch 1, 4, 16, 64
    python benchmarks/latency.py --presets hflow-demo --batches 1 --rounds 3

A preset is `trained_like`, exported and proved first, with --precision and --tune as `hflow-rt export` has them, and
kept in --work, so that a second go takes it from there. A report is written after every case; after --budget seconds
no case is begun.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, get_args

from measuring import RESULTS, exported_like

from hflow_rt.bench.measure import measure_latency
from hflow_rt.bench.report import write_report
from hflow_rt.bench.variants import VARIANTS, cases_of
from hflow_rt.choices import Routes
from hflow_rt.manifest import MANIFEST
from hflow_rt.runtime.bundle import find_bundle

PRESETS = {"cpu": ("hflow-demo", "hflow-128", "glow-64", "hflow-256"), "cuda": ("hflow-128", "hflow-256")}
BATCHES = {"cpu": (1, 16), "cuda": (1, 4, 16, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--presets", nargs="+")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--route", default="both", choices=get_args(Routes))
    parser.add_argument("--variants", nargs="+", help="only those with one of these in their name")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "mixed"))
    parser.add_argument("--tune", default="any", choices=("any", "cpu"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=36_000, help="seconds")
    parser.add_argument("--work", type=Path, default=Path("runs/latency"), help="where bundles are kept")
    given = parser.parse_args()
    ends = time.monotonic() + given.budget
    names = [name for name, variant in VARIANTS.items() if variant.device == given.device]
    wanted = [name for name in names if not given.variants or any(wish in name for wish in given.variants)]
    options = {"precision": given.precision, "tuning": given.tune}
    suffix = ("-mixed" if given.precision == "mixed" else "") + ("-tuned" if given.tune == "cpu" else "")
    for preset in given.presets or PRESETS[given.device]:
        folder = given.work / f"{preset}{suffix}"
        if not (folder / "bundle" / MANIFEST).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            exported_like(preset, folder, **options)
        target = RESULTS / f"{given.device}-{preset}{suffix}"

        def keep(report: dict[str, Any], target: Path = target) -> None:
            write_report(report, target)
            last = report["rows"][-1]
            print(f"{target}.md: {last['case']}, batch {last['batch']}", file=sys.stderr)
            if time.monotonic() > ends:
                raise TimeoutError

        try:
            batches = given.batches or BATCHES[given.device]
            bundle = find_bundle(folder)
            cases = cases_of(bundle.manifest, given.route)
            measure_latency(bundle, wanted, cases, batches, given.rounds, keep=keep)
        except TimeoutError:
            print(f"no time left for the rest of {preset} and what follows", file=sys.stderr)
            return


if __name__ == "__main__":
    main()
