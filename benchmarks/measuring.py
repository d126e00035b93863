"""What all benchmarks share: models to measure, fair timing, and a report that survives being cut short."""

import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hflow_rt.bench.machine import machine
from hflow_rt.bench.measure import UNSTABLE
from hflow_rt.files import atomic_file

__all__ = [
    "RESULTS",
    "Report",
    "exported_like",
    "reason",
    "spread",
    "take_turns",
    "time_limit",
    "trained_like",
]

RESULTS = Path(__file__).parent / "results"


def trained_like(preset: str, overrides: Sequence[str] = ()) -> Any:
    """A model of `preset` with nothing at zero, started on smooth images as training would, seeded.

    The heads that start at zero get little, so that the flow stays as well conditioned as a trained one: with
    large random heads a few bits of rounding decide the image.
    """
    from hflow_rt.models.checkpoint import build_model
    from hflow_rt.training.config import load_config

    torch.manual_seed(0)
    settings = load_config(preset, overrides=list(overrides))
    model = build_model(settings.family, settings.model)
    for parameter in model.parameters():
        if parameter.detach().abs().max() == 0:
            parameter.data = 1e-3 * torch.randn(parameter.shape)
    small = torch.rand(8, model.channels, 4, 4)
    pixels = torch.nn.functional.interpolate(small, size=model.resolution, mode="bilinear") * 255
    model.plan(settings.training).start(pixels.to(torch.uint8), torch.Generator().manual_seed(0))
    return model.eval()


def exported_like(
    preset: str, folder: Path, route: Any = "both", overrides: Sequence[str] = (), **options: Any
) -> tuple[Any, Path]:
    """`trained_like(preset, overrides)` and its verified bundle, `folder`/bundle; options: of `export_bundle`.

    A bundle that is there is taken for it.
    """
    from hflow_rt.export.bundle import export_bundle
    from hflow_rt.models.checkpoint import save_model
    from hflow_rt.training.config import load_config

    model, weights = trained_like(preset, overrides), folder / "model.safetensors"
    if (folder / "bundle").exists():
        return model, folder / "bundle"
    folder.mkdir(parents=True, exist_ok=True)
    save_model(weights, load_config(preset).family, model, model.state_dict(), {})
    ramp = np.linspace(0, 1, model.resolution, dtype=np.float32)
    images = np.broadcast_to(ramp, (2, model.channels, model.resolution, model.resolution)).copy()
    images[1] = images[1].transpose(0, 2, 1)
    images = np.rint(images * 255) / np.float32(255)  # 8-bit values, as real images have
    manifest = export_bundle(weights, folder / "bundle", images, route, **options)
    assert manifest.verified, manifest.parity
    return model, folder / "bundle"


def take_turns(
    variants: dict[str, Callable[[], Any]], rounds: int, fill: float = 0.0, cuda: bool = False
) -> dict[str, list[float]]:
    """Seconds of a call; the order rotates every round, after one round of warm-up.

    A sample is as many calls as fill `fill` seconds. With `cuda`, the device's own clock is read.
    """
    names = list(variants)
    calls = dict.fromkeys(names, 1)
    if fill:
        for name, run in variants.items():
            calls[name] = max(1, math.ceil(fill / min(_seconds(run, 1, cuda) for _ in range(2))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            found = _seconds(variants[name], calls[name], cuda)
            if index > 0:
                seconds[name].append(found)
    return seconds


def _seconds(run: Callable[[], Any], calls: int, cuda: bool) -> float:
    if not cuda:
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    elapsed: float = start.elapsed_time(stop)
    return elapsed / 1e3 / calls


def spread(seconds: list[float]) -> float:
    """Standard deviation over mean."""
    return statistics.stdev(seconds) / statistics.mean(seconds) if len(seconds) > 1 else 0.0


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """`TimeoutError` after `seconds`, wherever Python is by then; one that is not positive is over at once."""
    if seconds <= 0:
        raise TimeoutError("no time left")

    def over(*_: Any) -> None:
        raise TimeoutError(f"gave up after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: BaseException) -> str:
    """One line of what went wrong, fit for a table."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}".replace("|", "/")


class Report:
    """Rows by part, in `NAME.json` and `NAME.md`, written after each row.

    A part that runs again takes the place of what it found before and leaves the other parts alone, so that one
    report can be made in several goes. Without a path nothing is written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.part = path, ""
        self.parts: dict[str, dict[str, Any]] = {}
        if path is not None and path.with_suffix(".json").exists():
            self.parts = json.loads(path.with_suffix(".json").read_text())["parts"]

    def start(self, part: str, **settings: Any) -> None:
        """Rows that follow belong to `part`."""
        self.part = part
        self.parts[part] = {"machine": machine() | {"torch_threads": torch.get_num_threads()} | settings, "rows": []}

    def add(self, what: str, variant: str, **found: Any) -> None:
        """A row: `ms`, `ratio` and `cov` of a measurement, and anything else by name; or a `note` of why not."""
        row = {"what": what, "variant": variant, **found}
        self.parts[self.part]["rows"].append(row)
        print(_line(row), flush=True)
        if self.path is None:
            return
        with atomic_file(self.path.with_suffix(".json")) as file:
            file.write_text(json.dumps({"parts": self.parts}, indent=1) + "\n")
        with atomic_file(self.path.with_suffix(".md")) as file:
            file.write_text(self.markdown())

    def compare(self, what: str, seconds: dict[str, list[float]], more: dict[str, dict[str, Any]]) -> None:
        """A row a variant; the first is the baseline of the ratios. `more` is what else there is to say of each."""
        baseline = statistics.median(next(iter(seconds.values())))
        for name, values in seconds.items():
            median = statistics.median(values)
            timing = {"ms": median * 1e3, "min_ms": min(values) * 1e3, "rounds": len(values)}
            self.add(what, name, **timing, ratio=baseline / median, cov=spread(values), **more.get(name, {}))

    def markdown(self) -> str:
        """Every part as a table under what it was measured on."""
        lines = []
        for part, found in self.parts.items():
            about = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None)
            lines += [f"## {part}", "", about, "", "| what | variant | median | ratio | CoV | more |"]
            lines += ["|---|---|---:|---:|---:|---|", *map(_line, found["rows"]), ""]
        return "\n".join(lines)


_COLUMNS = {"what", "variant", "ms", "min_ms", "rounds", "ratio", "cov"}


def _line(row: dict[str, Any]) -> str:
    more = ", ".join(f"{key} {value}" if key != "note" else value for key, value in row.items() if key not in _COLUMNS)
    if "ms" not in row:
        return f"| {row['what']} | {row['variant']} | | | | {more} |"
    unstable = " (unstable)" if row["cov"] > UNSTABLE else ""
    digits = max(1, 3 - len(str(int(row["ms"]))))  # three that mean something
    cells = f"{row['ms']:.{digits}f} ms | {row['ratio']:.2f}x | {row['cov']:.1%}{unstable}"
    return f"| {row['what']} | {row['variant']} | {cells} | {more} |"
