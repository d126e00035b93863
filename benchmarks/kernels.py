"""What the Triton kernels are worth: bandwidth op by op, and models end to end, against plain torch in the same run.

    python benchmarks/kernels.py                  everything, into benchmarks/results/kernels-GPU.json and .md
    python benchmarks/kernels.py --part decode    one of kernels, decode, training, proof, dispatch; the rest is kept
    python benchmarks/kernels.py --budget 540     leave out what does not fit into so many seconds, and say so
    python benchmarks/kernels.py --dry-run        the same paths at tiny sizes on a CPU; nothing is written

Variants of a row take turns in one process and must agree before they are timed. What fails is a row with its reason.
`dispatch` needs no GPU: it measures what the switch costs a CPU. Under TRITON_INTERPRET=1 a dry run has kernels in it.
"""

import argparse
import contextlib
import copy
import functools
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from kernel_ops import OPS, Op, Size
from kernel_proof import time_proofs
from measuring import RESULTS, Report, reason, take_turns, time_limit, trained_like
from torch import Tensor
from torch._functorch import config as functorch_config

from hflow_rt.kernels import dispatch

Run = Callable[[], Any]
TARGETS = {"result": 0.85, "gradient": 0.80}  # of a copy's bandwidth
TRAINING_TARGET = 1.5  # times eager, of hflow; nearly all of a Glow step is its subnets' convolutions
DEMOS = ("hflow-demo", "glow-demo")  # small enough for a CPU
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # between variants, relative to the largest number
PREPARE_SECONDS = 150.0  # for a variant, most of which torch.compile may need
CALLS = 10  # of an op in a CUDA graph


@dataclass(frozen=True)
class Plan:
    """How much is measured, and where."""

    device: str
    ops: list[Op]
    sizes: dict[torch.dtype, Size]
    decodes: tuple[tuple[str, int], ...]  # preset and batch, the most telling first
    training: tuple[tuple[str, int], ...]
    rounds: int
    fill: float
    ends: float
    backend: str  # of torch.compile

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.ends - time.monotonic()


def at_batch(batch: int, presets: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((preset, batch) for preset in presets)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the Triton kernels; the head of the file says how.")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument("--ops", default="", metavar="PATTERN", help="only operators whose name matches, in `kernels`")
    parser.add_argument("--preset", action="append", help="of whole models; by default those of the paper, or demos")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    parts = arguments.part or [part for part in PARTS if part != "dispatch"]
    ends = time.monotonic() + arguments.budget
    ops = [op for op in OPS if re.search(arguments.ops, op.name)]
    demos = tuple(arguments.preset or DEMOS)
    if arguments.dry_run:
        sizes = dict.fromkeys(TOLERANCE, Size("cpu", 4096, 8))
        plan = Plan("cpu", ops, sizes, at_batch(1, demos), at_batch(2, demos), 2, 0.0, ends, "eager")
        report = Report()
    elif parts == ["dispatch"]:
        plan = Plan("cpu", [], {}, at_batch(1, demos), at_batch(16, demos), 60, 0.0, ends, "eager")
        report = Report(RESULTS / "dispatch-cpu")
    elif torch.cuda.is_available() and dispatch.INSTALLED and not dispatch.INTERPRETED:
        presets = tuple(arguments.preset or ("hflow-128", "hflow-256", "glow-64"))
        decodes = tuple(sized for batch in (1, 16, 64, 4) for sized in at_batch(batch, presets))
        steps = at_batch(16, tuple(arguments.preset or ("hflow-128", "glow-64")))
        sizes = dict.fromkeys(TOLERANCE, Size("cuda", 128 << 20, 256))
        plan = Plan("cuda", ops, sizes, decodes, steps, 15, 0.01, ends, "inductor")
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        report = Report(RESULTS / f"kernels-{gpu}")
    else:
        print(
            "benchmarks/kernels.py needs a CUDA device and triton; --dry-run runs it at tiny sizes on a CPU",
            file=sys.stderr,
        )
        return 1
    # a stream of its own: what runs on the default stream cannot be captured in a CUDA graph
    with torch.cuda.stream(torch.cuda.Stream()) if plan.cuda else contextlib.nullcontext():
        for part in parts:
            report.start(part)
            with failing(report, part, "all"):
                PARTS[part](plan, report)
    if report.path is not None:
        print(f"wrote {report.path.with_suffix('.md')}")
    return 0


@contextlib.contextmanager
def failing(report: Report, what: str, variant: str) -> Iterator[None]:
    """An exception inside becomes a row."""
    try:
        yield
    except Exception as error:
        report.add(what, variant, note=f"failed: {reason(error)}")


def compare(
    plan: Plan, report: Report, what: str, makers: dict[str, Callable[[], Run]], tolerance: float,
    more: Callable[[str, dict[str, float]], dict[str, Any]], calls: int = 1,
) -> None:  # fmt: skip
    """Make every variant, check it against the first, time those that agree in turns, and report all.

    What a variant returns is compared number by number, unless it is None; it stands for `calls` calls. `more` makes
    the rest of a row from the median seconds of all.
    """
    if plan.left() < 1:
        report.add(what, "all", note="left out: no time left")
        return
    runs: dict[str, Run] = {}
    expected: list[Tensor] = []
    for name, make in makers.items():
        with failing(report, what, name), time_limit(min(PREPARE_SECONDS, plan.left())):
            run = make()
            found = tensors(run())
            expected = expected or found
            off = max((difference(a, b) for a, b in zip(found, expected, strict=False)), default=0.0)
            if not off <= tolerance:
                raise ArithmeticError(f"off by {off:.1e} of the largest number where {tolerance:.0e} is allowed")
            runs[name] = run
    with failing(report, what, "timing"), time_limit(plan.left()):
        seconds = take_turns(runs, plan.rounds, plan.fill, plan.cuda)
        seconds = {name: [second / calls for second in values] for name, values in seconds.items()}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        report.compare(what, seconds, {name: more(name, medians) for name in runs})


def tensors(found: Any) -> list[Tensor]:
    """The tensors of a result, apart from any graph."""
    if found is None:
        return []
    return [found.detach().clone()] if isinstance(found, Tensor) else [t.detach().clone() for t in found]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12))


def on(choice: str, run: Run) -> Run:
    """`run` on the kernels, or on plain torch."""

    def chosen() -> Any:
        with dispatch.using(choice):
            return run()

    return chosen


def captured(plan: Plan, run: Run, calls: int = 1) -> Run:
    """`calls` of `run` as one CUDA graph, so that launching them costs next to nothing. Returns the last result."""
    if not plan.cuda:
        return run
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


# -- kernels: bandwidth of every op, as a share of that of a copy


def kernels(plan: Plan, report: Report) -> None:
    """The result and the gradient of every op, on tensors that no cache holds."""
    functorch_config.donated_buffer = False  # else a compiled gradient can be taken only once
    for dtype, size in plan.sizes.items():
        for op in plan.ops:
            for target in TARGETS:
                with failing(report, f"{op.name}, {target}", "all"):
                    measure_op(plan, report, op, target, size.of(dtype))


def measure_op(plan: Plan, report: Report, op: Op, target: str, size: Size) -> None:
    """Plain torch, torch.compile of it, the kernels, and a copy that moves as many bytes."""
    torch._dynamo.reset()
    f, inputs = op.make(size)
    moved = op.moved(f, inputs, target)
    halves = torch.zeros(2, moved // 2, dtype=torch.uint8, device=plan.device)
    notes: dict[str, str] = {}

    def run(f: Callable[..., Tensor]) -> Run:
        if target == "result":
            return torch.no_grad()(lambda: f(*inputs))
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = f(*leaves)
        above = torch.linspace(-1, 1, y.numel(), device=y.device).sin().view(y.shape).to(y.dtype)
        return lambda: torch.autograd.grad(y, leaves, above, retain_graph=True)

    def repeated(name: str, run: Run) -> Run:
        try:
            return captured(plan, run, CALLS)
        except Exception as error:  # timed with its launches then
            notes[name] = f"not in a graph, {reason(error)}"
            return lambda: [run() for _ in range(CALLS)][-1]

    def variant(name: str, choice: str) -> Run:
        g = torch.compile(f, backend=plan.backend, dynamic=False) if name == "torch.compile" else f
        with dispatch.using(choice):
            return repeated(name, on(choice, run(g)))

    def copied() -> Run:
        return repeated("copy", lambda: (halves[0].copy_(halves[1]), None)[1])

    def more(name: str, seconds: dict[str, float]) -> dict[str, Any]:
        found: dict[str, Any] = {"GB/s": round(moved / seconds[name] / 1e9)}
        if "copy" in seconds and name != "copy":
            found["share"] = f"{seconds['copy'] / seconds[name]:.0%}"
        if name == "kernels":
            found["target"] = f"{TARGETS[target]:.0%}"
        return found | ({"note": notes[name]} if name in notes else {})

    makers = {
        "eager": lambda: variant("eager", "reference"),
        "torch.compile": lambda: variant("torch.compile", "reference"),
        "kernels": lambda: variant("kernels", "triton"),
        "copy": copied,
    }
    what = f"{op.name}, {target}, {str(size.dtype)[6:]}, {moved / 2**20:.3g} MiB moved"
    compare(plan, report, what, makers, TOLERANCE[size.dtype], more, CALLS)


# -- end to end


@functools.cache
def model_of(preset: str, device: str) -> Any:
    return trained_like(preset).to(device)


def decode(plan: Plan, report: Report) -> None:
    """Latents to image at every size of the plan."""
    for preset, batch in plan.decodes:
        what = f"{preset} decode, batch {batch}"
        with failing(report, what, "all"), torch.no_grad():
            measure_decode(plan, report, what, model_of(preset, plan.device), batch)


def measure_decode(plan: Plan, report: Report, what: str, model: Any, batch: int) -> None:
    """The model as it trains, its folded copy, the kernels, CUDA graphs of both, torch.compile."""
    folded = model.folded()
    compiled = torch.compile(folded.decode, backend=plan.backend, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    latents = {
        name: (0.7 * torch.randn(batch, *shape, generator=generator)).to(plan.device)
        for name, shape in model.latent_shapes().items()
    }
    plain = on("reference", lambda: folded.decode(latents))
    fused = on("triton", lambda: folded.decode(latents))
    makers: dict[str, Callable[[], Run]] = {
        "eager": lambda: on("reference", lambda: model.decode(latents)),
        "folded": lambda: plain,
        "kernels": lambda: fused,
        "folded, CUDA graph": lambda: captured(plan, plain),
        "kernels, CUDA graph": lambda: captured(plan, fused),
        "torch.compile": lambda: on("reference", lambda: compiled(latents)),
    }
    compare(plan, report, what, makers, 2e-2, lambda name, seconds: {"images/s": round(batch / seconds[name], 1)})


def training(plan: Plan, report: Report) -> None:
    """A step of Adam with every preset of the plan."""
    for preset, batch in plan.training:
        with failing(report, f"{preset} training step, batch {batch}", "all"):
            measure_training(plan, report, preset, batch)


def measure_training(plan: Plan, report: Report, preset: str, batch: int) -> None:
    """Seconds, and the most memory a variant holds, weights and moments included."""
    base = model_of(preset, plan.device)
    side = base.resolution
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, base.channels, side, side, generator=generator).to(plan.device) - 0.5
    noise = {
        name: torch.randn(batch, *shape, generator=generator).to(plan.device)
        for name, shape in base.noise_shapes().items()
    }
    peaks: dict[str, float] = {}

    def variant(name: str, choice: str) -> Run:
        held = torch.cuda.memory_allocated() if plan.cuda else 0
        model = copy.deepcopy(base).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model.loss(images, noise).loss
            loss.backward()
            optimizer.step()
            return loss

        run = on(choice, step)
        run()
        if plan.cuda:
            torch.cuda.reset_peak_memory_stats()
            run()
            peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
        return run

    def more(name: str, seconds: dict[str, float]) -> dict[str, Any]:
        target = {"target": f"{TRAINING_TARGET}x"} if name == "kernels" and preset.startswith("hflow") else {}
        return {"peak_mib": round(peaks.get(name, 0)), "images/s": round(batch / seconds[name], 1)} | target

    makers = {"eager": lambda: variant("eager", "reference"), "kernels": lambda: variant("kernels", "triton")}
    compare(plan, report, f"{preset} training step, batch {batch}", makers, 1e-3, more)


# -- what the switch costs where no kernel runs


def switch(plan: Plan, report: Report) -> None:
    """Calls of `dispatch.takes` in a decode and in a training step on the CPU, times what one costs."""
    for preset, batch in plan.training:
        price_switch(plan, report, preset, batch)


def price_switch(plan: Plan, report: Report, preset: str, batch: int) -> None:
    model = model_of(preset, "cpu")
    latents = {name: torch.randn(1, *shape) for name, shape in model.latent_shapes().items()}
    images = torch.rand(batch, model.channels, model.resolution, model.resolution) - 0.5
    folded = model.folded()
    works: dict[str, Run] = {
        "decode, batch 1": torch.no_grad()(lambda: model.decode(latents)),
        "folded decode, batch 1": torch.no_grad()(lambda: folded.decode(latents)),
        f"training step, batch {batch}": lambda: model.loss(images).loss.backward(),
    }
    for name, work in works.items():
        run = on("reference", work)
        asked = calls_of_takes(run)
        seconds = take_turns({"plain torch": run, "the switch alone": lambda n=asked: ask(n)}, plan.rounds)
        share = min(seconds["the switch alone"]) / min(seconds["plain torch"])
        report.compare(f"{preset} {name}", seconds, {"the switch alone": {"calls": asked, "share": f"{share:.3%}"}})


def ask(calls: int) -> None:
    x = torch.zeros(1)
    for _ in range(calls):
        dispatch.takes(x)


def calls_of_takes(run: Run) -> int:
    """How often `run` asks whether the kernels take a tensor."""
    takes, asked = dispatch.takes, 0

    def counted(x: Tensor) -> bool:
        nonlocal asked
        asked += 1
        return takes(x)

    using = [
        module for name, module in sys.modules.items() if name.startswith("hflow_rt.") and hasattr(module, "takes")
    ]
    try:
        for module in using:
            module.takes = counted  # type: ignore[attr-defined]
        run()
    finally:
        for module in using:
            module.takes = takes  # type: ignore[attr-defined]
    return asked


PARTS: dict[str, Callable[[Plan, Report], None]] = {
    "kernels": kernels,
    "decode": decode,
    "training": training,
    "proof": lambda plan, report: time_proofs(report, plan.device),
    "dispatch": switch,
}

if __name__ == "__main__":
    sys.exit(main())
