"""Compile every kernel ahead of time for every GPU generation, and read registers and spills back from ptxas.

Run as `python -m hflow_rt.kernels.report`, with or without a GPU; exits 1 where a kernel spills. What is compiled is
what a launch would compile: the host functions run on meta tensors, and their launches are written down.
"""

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hflow_rt.errors import BackendUnavailable
from hflow_rt.kernels import (
    batch_norm,
    bias_act,
    blur,
    coupling_kernels,
    dispatch,
    group_norm,
    instance_norm,
    mixing,
    mixture_image,
    mixture_kernels,
    modulated_weights,
    quantise,
    residual_normal,
    sampler_update,
    split_act,
    squeeze_excite,
)
from hflow_rt.kernels.channels import SUMMED
from hflow_rt.kernels.dispatch import Launch, recorded

__all__ = ["CAPABILITIES", "Compiled", "compiled", "launches", "main"]

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one compute capability."""

    name: str
    capability: int
    registers: int
    spilled: int  # bytes, stores and loads together
    shared: int  # bytes


def launches() -> dict[str, Launch]:
    """A launch of every kernel configuration by name: operator, type, size, what is switched on."""
    found: dict[str, Launch] = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for call, run in _calls(dtype):
            with recorded() as record:
                run()
            for launch in record:
                kernel = launch.kernel.fn.__name__.strip("_") + " " + launch.arguments.get("SUMS", "")
                found[f"{call} {kind} {kernel.strip()}"] = launch
    return {name: found[name] for name in found if _first(found, name)}


def _first(found: dict[str, Launch], name: str) -> bool:
    """Whether no launch before `name` compiles to the same code."""
    for other, launch in found.items():
        if other == name:
            return True
        if launch.kernel is found[name].kernel and _specialised(launch) == _specialised(found[name]):
            return False
    raise KeyError(name)


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    def tensor(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    half = dtype != torch.float32  # the same code but for loads and stores, so its extremes will do
    # whole lanes of one plane, sides that nothing divides, several planes a program
    for side in (256, 30) if half else (256, 30, 4):
        x = tensor(2, 12, side, side)
        for emit in (False, True):
            what = " moments" if emit else ""
            yield f"blur_down{what} {side}", lambda x=x, emit=emit: blur._down_triton(x, emit)
            yield f"blur_up{what} {side}", lambda x=x, emit=emit: blur._up_triton(x, emit)
        yield f"blur_down_adjoint {side}", lambda x=x: blur._down_adjoint_triton(x, 2 * x.shape[2], 2 * x.shape[3])
        yield f"blur_up_adjoint {side}", lambda x=x: blur._up_adjoint_triton(x)
    # parts of a plane, the largest whole plane, one that 16 divides, several a program
    for side in (256, 90) if half else (256, 90, 64, 4):
        x = tensor(2, 12, side, side)
        moments = torch.empty(2, 12, 2, device="meta")
        scale, shift = tensor(2, 24).chunk(2, 1)
        for what, style, more in (("plain", (None, None), None), ("all", (scale, shift), x)):
            options = (*style, more, None, more is not None)
            yield f"norm {what} {side}", lambda x=x, options=options: instance_norm._norm_triton(x, *options)
            backward = (x, x, *style, moments, more is not None, more is not None)
            yield f"norm_backward {what} {side}", lambda a=backward: instance_norm._norm_backward_triton(*a)
    # a plane of several parts, a whole one, several a program; alone with a level, and beside another tensor
    for side in (64,) if half else (64, 28, 7):
        x, skip = tensor(2, 128, side, side), tensor(2, 64, side, side)
        for what, more, level in (("level", None, tensor(128)), ("skip", skip, None)):
            weight = torch.empty(192 if more is not None else 128, device="meta")
            rest = (more, level, weight, weight, 32)
            moments = torch.empty(2, 32, 2, device="meta")
            yield f"group_norm {what} {side}", lambda x=x, rest=rest: group_norm._norm_triton(x, *rest)
            backward = (tensor(2, len(weight), side, side), x, *rest[:4], moments)
            yield f"group_norm_backward {what} {side}", lambda a=backward: group_norm._backward_triton(*a)
    image, numbers = tensor(2, 3, 64, 64), tensor(2)
    update = (image, image, image, image, numbers, numbers)
    yield "sampler_update", lambda: sampler_update._update_triton(*update)
    yield "quantise", lambda: quantise._quantise_triton(image)
    yield from _autoencoder_calls(dtype)
    yield from _generator_calls(dtype)
    yield from _coupling_calls(dtype)


def _autoencoder_calls(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Hierarchies of latents and mixtures of logistics; what reads and writes of batch norm is group norm's."""

    def tensor(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    half, single = dtype != torch.float32, torch.float32
    # sides that 16 divides, and that nothing divides
    for side in (64,) if half else (64, 7):
        x, line = tensor(2, 64, side, side), tensor(64, dtype=single)
        yield f"batch_norm {side}", lambda x=x, line=line: batch_norm._norm_triton(x, line, line)
        layers = (tensor(4, 64, dtype=single), tensor(4, dtype=single), tensor(64, 4, dtype=single))
        means = tensor(2, 64, dtype=single)
        excite, excited = (x, x, *layers, line, 0.1), (x, x, means, means, *layers, 0.1)
        yield f"squeeze_excite {side}", lambda excite=excite: squeeze_excite._excite_triton(*excite)
        yield f"squeeze_excite_backward {side}", lambda a=excited: squeeze_excite._backward_triton(*a)
        raw, noise = tensor(2, 40, side, side), tensor(2, 20, side, side, dtype=single)
        of_all = tensor(1, 40, 1, 1)
        for what, prior, z in (("", raw, None),) if half else (("", raw, None), (" moved, one prior", of_all, noise)):
            rest = (raw, prior, noise, z, True)
            yield f"residual_normal{what} {side}", lambda rest=rest: residual_normal._residual_triton(*rest)
            back = (noise, tensor(2, 20, dtype=single), *rest)
            yield f"residual_normal_backward{what} {side}", lambda a=back: residual_normal._backward_triton(*a)
    for channels, published in ((3, True),) if half else ((3, False), (3, True), (1, True)):
        logits = tensor(2, mixture_kernels.parameters_of(channels) * 10, 32, 32)
        image, plane = tensor(2, channels, 32, 32, dtype=single), tensor(2, 32, 32, dtype=single)
        forward, sums = (logits, image, 8, published), tensor(2, 3, 32, 32, dtype=single)
        judged = (plane, logits, image, sums, 8, published)
        what = f"{channels} channels{' published' if published else ''}"
        yield f"mixture_log_prob {what}", lambda forward=forward: mixture_kernels.log_prob_triton(*forward)
        yield f"mixture_log_prob_backward {what}", lambda a=judged: mixture_kernels.backward_triton(*a)
        drawn = (tensor(2, 10, 32, 32, dtype=single), image, tensor(mixture_image.LEVELS, dtype=single))
        for name, draws, as_bytes in (("mean", (None, None, None), not published), ("draw", drawn, published)):
            rest, what = (logits, *draws, channels, as_bytes), f"{channels} channels{' bytes' if as_bytes else ''}"
            yield f"mixture_image {name} {what}", lambda rest=rest: mixture_image._image_triton(*rest)


def _generator_calls(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Layers of a generator whose weights are made for each image: the widest, and one of odd sizes."""
    half = dtype != torch.float32
    for channels, side in ((256, 64),) if half else ((256, 64), (6, 3)):
        low, high, bias = (
            torch.empty(size, dtype=dtype, device="meta")
            for size in ((2, channels, side, side), (2, channels, 2 * side, 2 * side), (channels,))
        )
        for mode in split_act.MODES[1 if half else 0 :]:
            call = (high, low, bias, mode)
            yield f"split_act {mode} {channels}x{side}", lambda call=call: split_act._split_triton(*call)
            yield f"split_act_backward {mode} {side}", lambda call=(high, side, mode): split_act._gathered_triton(*call)
        for what, clamp in (("clamp ", 256.0),) if half else (("", None), ("clamp ", 256.0)):
            name, how = f"{what}{channels}x{2 * side}", (0.2, 1.0, clamp)
            yield f"bias_act {name}", lambda a=(high, bias, *how): bias_act._act_triton(*a)
            yield f"bias_act_backward {name}", lambda a=(high, high, *how, True): bias_act._backward_triton(*a)
    for c_out, c_in, rank in ((512, 688, 10),) if half else ((512, 688, 10), (128, 128, 10), (5, 7, 3)):
        style = torch.empty(2, (c_out + c_in) * rank, dtype=dtype, device="meta")
        weight, made = torch.empty(c_out, c_in, device="meta"), torch.empty(2, c_out, c_in, device="meta")
        for what, columns in (("", None), (" columns", torch.empty(2, c_in, device="meta")))[1 if half else 0 :]:
            name, rest = f"{c_out}x{c_in}{what}", (style, weight, columns, rank, 1.0)
            yield f"modulated_weights {name}", lambda a=rest: modulated_weights._generate_triton(*a)
            yield f"modulated_weights_backward {name}", lambda a=(made, *rest): modulated_weights._backward_triton(*a)


def _coupling_calls(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """The flow's steps; `dtype` is that of the nets, the flow itself is float32."""
    half = dtype != torch.float32
    # the levels of the image models; other forms where code is read best; one sample a program; sides nothing divides;
    # the largest map a lane holds, whose gradient is torch's
    clipped = [(3, 256, "board")]
    if not half:
        clipped += [(3, 256, "split"), (3, 256, "post"), (3, 256, "alone"), (4, 64, "board"), (8, 32, "post")]
    calls = [(size, "clipped", inverse) for size in clipped for inverse in (False, True)]
    if not half:
        calls += [((8, 8, "split"), "clipped", True)]
        calls += [((3, 256, "board"), form, True) for form in ("sigmoid", "exp_sigmoid", "additive")]
        calls += [((3, 256, "split"), "sigmoid", False), ((5, 30, "board"), "clipped", True)]
        calls += [((16, 64, "post"), form, inverse) for form, inverse in (("clipped", True), ("sigmoid", False))]
        # nets that give one half only: with the map that follows on the finest level, and alone as it trains
        for form in ("sigmoid", "exp_sigmoid", "additive"):
            sizes = [(12, 32, "half"), (12, 32, "half alone")]
            sizes += [(c, 384 // c, "half alone") for c in (24, 48, 96) if form == "sigmoid"]
            calls += [(size, form, inverse) for size in sizes for inverse in (False, True)]
    for (channels, side, what), form, inverse in calls:
        x = torch.empty(2, channels, side, side, device="meta")
        given = channels // 2 if what.startswith("half") else channels
        r, t = torch.empty(2, 2 * given, side, side, dtype=dtype, device="meta").chunk(2, 1)
        weight, bias = x.new_empty(channels, channels), x.new_empty(channels)
        region = [0, channels, 2, 2, 1] if what in ("board", "post") else [channels // 2, channels, 0, 0, 0]
        maps = (None, None, None) if what.endswith("alone") else (weight, bias, weight)
        outer = (x, x) if what == "post" else (None, None)
        rest = (None if form == "additive" else r, t, *maps, *outer, region, inverse, form)
        name = f"{what} {form} {'inverse' if inverse else 'forward'} {channels}x{side}"
        yield f"coupling {name}", lambda x=x, rest=rest: coupling_kernels.couple(x, *rest)
        if channels <= SUMMED or what.endswith("alone"):
            g = (x, x[:, 0, 0, 0], x)
            yield f"coupling_backward {name}", lambda g=g, rest=rest: coupling_kernels.couple_backward(*g, *rest)
    if not half:
        yield from _mixing_calls()


def _mixing_calls() -> Iterator[tuple[str, Any]]:
    """The first map of a level, and a map by itself."""
    sizes = ((3, 256, "full"), (3, 256, "diagonal"), (8, 32, "full"), (16, 64, "full"), (12, 32, "full"))
    for channels, side, what in sizes:
        x = torch.empty(2, channels, side, side, device="meta")
        bias = x.new_empty(channels)
        weight = bias if what == "diagonal" else x.new_empty(channels, channels)
        kinds = (
            ("bias", (bias, None, None)) if channels == 12 else ("pre", (bias, x, x)),
            ("alone", (None, None, None)),
        )
        for name, maps in kinds:
            rest = (weight, *maps, what == "diagonal")
            yield f"mixing {what} {name} {channels}x{side}", lambda x=x, rest=rest: mixing._mixing_triton(x, *rest)
            if channels <= SUMMED:
                yield (
                    f"mixing_backward {what} {name} {channels}x{side}",
                    lambda x=x, rest=rest: mixing._mixing_backward_triton(x, x, *rest),
                )


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]], int]:
    """Signature, constants and attributes as the launcher would find them, and the warps."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for at, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        # a 1 is compiled in, a multiple of 16 is marked, and a tensor of torch starts at a multiple of 16 bytes
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, launch.warps


def compiled(name: str, launch: Launch, capability: int) -> Compiled:
    """Compile one launch for compute capability `capability` / 10. Needs Triton and no GPU."""
    if not dispatch.INSTALLED or dispatch.INTERPRETED:
        raise BackendUnavailable("the report needs triton, not interpreted: pip install 'hflow-rt[kernels]' on Linux")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, warps = _specialised(launch)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
    ):
        triton.knobs.cache.dir = folder  # ptxas speaks only where nothing is cached
        triton.knobs.nvidia.dump_ptxas_log = True
        source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
        with contextlib.redirect_stdout(log):
            binary = triton.compile(
                source,
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": warps, "enable_fp_fusion": True},
            )
    used = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if used is None or spills is None:
        raise RuntimeError(f"ptxas did not say what it used: {log.getvalue()!r}")
    return Compiled(name, capability, int(used[1]), int(spills[1]) + int(spills[2]), binary.metadata.shared)


def main() -> int:
    """Print the table as markdown. Returns 1 where anything spills."""
    print(f"| kernel (warps) | {' | '.join(f'sm_{capability}' for capability in CAPABILITIES)} | shared |")
    print(f"|---|{'---:|' * (len(CAPABILITIES) + 1)}")
    spilled = 0
    for name, launch in launches().items():
        row = [compiled(name, launch, capability) for capability in CAPABILITIES]
        cells = [f"{cell.registers}" + (f" (spills {cell.spilled} B)" if cell.spilled else "") for cell in row]
        print(f"| {name} ({launch.warps}) | {' | '.join(cells)} | {max(cell.shared for cell in row)} |", flush=True)
        spilled += sum(cell.spilled for cell in row)
    print(f"\nregisters a thread; {spilled} bytes spilled in all")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
