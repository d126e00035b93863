"""Deliberate faults of an exported model: what the proof of an export has to catch.

`faults(model, images, seed)` yields each with a function that brings it into the graphs of a bundle. Those in the model
change the folded module, and the graphs of all directions get its tensors; the others change the graphs themselves.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from hflow_rt.kernels.instance_norm import EPSILON
from hflow_rt.layers.actnorm import ActNorm
from hflow_rt.layers.resample import FoldedInstanceNorm
from hflow_rt.models.family import LatentModel

__all__ = ["IN_GRAPH", "IN_MODEL", "MATTERS", "faults", "state"]

Array = np.ndarray[Any, np.dtype[Any]]
# What a fault changes at least of some output, relative to its size and in exact arithmetic: a third of a constant that
# is off by 1e-4, some 500 roundings of float32. What changes less, such as a layer before a head of zeros, is none:
# of 33 constants that changed 1e-5 to 3e-5, two stayed within a few times torch's own error, as rounding does.
MATTERS = 3e-5


# -- in the folded model, whose tensors the graphs hold


def _left_out(model: LatentModel, rng: np.random.Generator) -> LatentModel:
    """A step of a chain is the identity (an affine one of Glow keeps the scale of logits 0)."""
    folded = model.folded()
    chains = [module for module in folded.modules() if hasattr(module, "couplings")]
    chain: Any = chains[rng.integers(len(chains))]
    step = int(rng.integers(len(chain.couplings)))
    glow = hasattr(chain, "into")
    for channel_map in (chain.into[step], chain.back[step]) if glow else (chain.before[step], chain.after[step]):
        eye = torch.eye(*channel_map.weight.shape[:2])
        channel_map.weight.data.copy_(eye.view_as(channel_map.weight))
        channel_map.bias.data.zero_()
    net = chain.couplings[step].net
    for layer in (net[-1],) if glow else (net.scale_out, net.shift_out):
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data.zero_()
    return folded


def _swapped(model: LatentModel, rng: np.random.Generator) -> LatentModel:
    """Two output channels of a layer have changed places."""
    folded = model.folded()
    layers = [m for m in folded.modules() if getattr(m, "weight", None) is not None and m.weight.dim() > 1]
    layers = [layer for layer in layers if len(layer.weight) > 1 and layer.weight[0].numel() > 1]
    layer: Any = layers[rng.integers(len(layers))]
    one, other = rng.choice(len(layer.weight), 2, replace=False)
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            tensor.data[[one, other]] = tensor.data[[other, one]]
    return folded


def _constant(model: LatentModel, rng: np.random.Generator) -> LatentModel:
    """All of one weight or bias is off by 1e-4 of itself."""
    folded = model.folded()
    tensors = list(folded.parameters())
    tensors[rng.integers(len(tensors))].data.mul_(1 + 1e-4)
    return folded


def _epsilon_added(model: LatentModel, rng: np.random.Generator) -> LatentModel:
    """Every actnorm divides by its scale plus 1e-5."""
    changed = copy.deepcopy(model)
    for module in changed.modules():
        if isinstance(module, ActNorm):
            module.log_scale.data = torch.log(module.log_scale.double().exp() + 1e-5)
    return changed.folded()


# -- in the graphs


def _epsilon_outside(proto: onnx.ModelProto) -> bool:
    """`x / (sqrt(variance) + epsilon)` for `x / sqrt(variance + epsilon)`."""
    nodes, found = [], False
    one = numpy_helper.from_array(np.array([2, 3]), "study.axes")
    for index, node in enumerate(proto.graph.node):
        if node.op_type != "InstanceNormalization":
            nodes.append(node)
            continue
        if not found:
            proto.graph.initializer.append(one)
            proto.graph.initializer.append(numpy_helper.from_array(np.float32(EPSILON), "study.epsilon"))
        found = True
        (x, scale, _), (y,) = node.input, node.output

        def step(operator: str, inputs: list[str], output: str, prefix: str = f"study.{index}.") -> str:
            nodes.append(helper.make_node(operator, inputs, [prefix + output]))
            return prefix + output

        (ratio,) = {float(v) for t in proto.graph.initializer if t.name == scale for v in numpy_helper.to_array(t)}
        name = f"study.{index}.ratio"
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(1 / ratio), name))
        centred = step("Sub", [x, step("ReduceMean", [x, "study.axes"], "mean")], "centred")
        variance = step("ReduceMean", [step("Mul", [centred, centred], "square"), "study.axes"], "variance")
        deviation = step("Mul", [step("Sqrt", [variance], "root"), name], "deviation")
        divisor = step("Add", [deviation, "study.epsilon"], "divisor")
        nodes.append(helper.make_node("Div", [centred, divisor], [y]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return found


def _epsilon_larger(proto: onnx.ModelProto) -> bool:
    """1e-5, as torch has it, for 1e-6."""
    found = False
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "InstanceNormalization" and attribute.name == "epsilon":
                attribute.f *= 10
                found = True
    return found


def _tf32(proto: onnx.ModelProto) -> bool:
    """What convolutions and products of matrices read has 10 bits of mantissa, as on tensor cores."""
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    splitter = "study.splitter"
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(2**13 + 1), splitter))
    nodes: list[onnx.NodeProto] = []
    rounded: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            for position, name in enumerate(node.input[:2]):
                if name in rounded:
                    pass
                elif name in values:
                    new = numpy_helper.from_array(_ten_bits(numpy_helper.to_array(values[name])), f"study.{name}")
                    proto.graph.initializer.append(new)
                    rounded[name] = new.name
                else:  # Veltkamp's: what is left of x after x 2^13 has swallowed the low bits
                    large, low, high = (f"study.{name}.{part}" for part in ("large", "low", "high"))
                    nodes += [
                        helper.make_node("Mul", [name, splitter], [large]),
                        helper.make_node("Sub", [large, name], [low]),
                        helper.make_node("Sub", [large, low], [high]),
                    ]
                    rounded[name] = high
                node.input[position] = rounded[name]
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return True


def _ten_bits(values: Array) -> Array:
    large = values * np.float32(2**13 + 1)
    rounded: Array = large - (large - values)
    return rounded.astype(np.float32)


def _norm(outside: float, inside: float) -> Callable[[FoldedInstanceNorm, torch.Tensor], torch.Tensor]:
    """The norm with these epsilons, for the folded model."""

    def plain(_: FoldedInstanceNorm, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)
        return (x - mean) / (torch.sqrt(variance + inside) + outside)

    return plain


# name: what it does to the folded model
IN_MODEL: dict[str, Callable[[LatentModel, np.random.Generator], LatentModel]] = {
    "a step left out": _left_out,
    "two channels swapped": _swapped,
    "a constant off by 1e-4": _constant,
    "epsilon in every actnorm": _epsilon_added,
}
# name: what it does to a graph, and what stands for its norm in exact arithmetic
IN_GRAPH: dict[str, tuple[Callable[[onnx.ModelProto], bool], Any]] = {
    "epsilon outside the root": (_epsilon_outside, _norm(EPSILON, 0)),
    "epsilon ten times as large": (_epsilon_larger, _norm(0, 10 * EPSILON)),
    "TF32": (_tf32, None),
}

# -- into a bundle


def _replaced(proto: onnx.ModelProto, before: dict[str, Array], after: dict[str, Array]) -> tuple[set[str], set[str]]:
    """Give what the graph holds of `before` the values of `after`; names of tensors it holds, and of changed ones."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    changed = {n for n, values in after.items() if values.size > 1 and not np.array_equal(values, before[n])}
    held = set()
    for name in changed:
        found = [tensors[name]] if name in tensors else [t for t in tensors.values() if _holds(t, before[name])]
        if len(found) == 1:  # else this direction does not use it, or it has the values of another
            shape = list(found[0].dims)
            found[0].CopyFrom(numpy_helper.from_array(after[name].reshape(shape), found[0].name))
            held.add(name)
    return held, changed


def _plain(names: set[str]) -> set[str]:
    """The names without that of the graph's own view of the model: `model.` or, of an inner graph, what it is."""
    return {name.split(".", 1)[1] for name in names if name.startswith("model.")}


def _holds(tensor: onnx.TensorProto, values: Array) -> bool:
    """The same numbers in any shape."""
    if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) != values.size:
        return False
    return np.array_equal(numpy_helper.to_array(tensor).ravel(), values.ravel())


def _outputs(model: LatentModel, images: Array, seed: int) -> list[torch.Tensor]:
    """Image of two latents, latents and log-probability of two images, in float64."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).double()
    told = {name: torch.eye(len(options)).double()[:2] for name, options in model.conditions().items()}
    latents = {
        name: std * torch.randn(2, *model.latent_shapes()[name], generator=generator, dtype=torch.float64)
        for name, std in model.prior_std().items()
    }
    pixels = torch.from_numpy(np.resize(images, (2, *images.shape[1:]))).double()
    with torch.no_grad():
        encoding = model.encode(pixels, told)
        return [model.decode(latents | told), *encoding.latents.values(), encoding.log_prob]


def _change(exact: list[torch.Tensor], faulty: list[torch.Tensor]) -> float:
    """The largest change of an output, root mean squares over root mean squares."""
    return max(
        float((one - other).square().mean().sqrt() / one.square().mean().sqrt().clamp_min(1e-30))
        for one, other in zip(exact, faulty, strict=True)
    )


def faults(model: LatentModel, images: Array, seed: int) -> Iterator[tuple[str, Callable[[Path], float | None]]]:
    """Name and what brings the fault into the graphs of a bundle of `model`, changing files but not the manifest.

    It returns how much of an output exact arithmetic sees changed, NaN where that was not computed, or None, and does
    nothing, where the model cannot have the fault. images: float32 `[N, 3, R, R]`.
    """
    specs = model.graphs()
    exact = _outputs(model.folded(), images, seed)

    def in_model(name: str, bundle: Path) -> float | None:
        rng = np.random.default_rng([seed, list(IN_MODEL).index(name)])
        protos = {path.stem: onnx.load(path) for path in sorted(bundle.glob("*.onnx"))}
        for _ in range(200):  # most layers of a little-trained model stand before a head of zeros
            faulty = IN_MODEL[name](model, rng)
            if (effect := _change(exact, _outputs(faulty, images, seed))) < MATTERS:
                continue
            with mock.patch.object(type(model), "folded", lambda _, faulty=faulty: faulty):
                changed = type(model).graphs(model)
            pairs = {graph: (state(specs[graph].module), state(changed[graph].module)) for graph in protos}
            held, wanted = zip(*(_replaced(protos[graph], *states) for graph, states in pairs.items()), strict=True)
            if set().union(*(_plain(names) for names in held)) == set().union(*(_plain(names) for names in wanted)):
                for graph, proto in protos.items():
                    onnx.save(proto, bundle / f"{graph}.onnx")
                return effect
            protos = {path.stem: onnx.load(path) for path in sorted(bundle.glob("*.onnx"))}
        return None

    def in_graph(name: str, bundle: Path) -> float | None:
        change, norm = IN_GRAPH[name]
        effect = float("nan")
        if norm is not None:
            with mock.patch.object(FoldedInstanceNorm, "plain", norm):
                effect = _change(exact, _outputs(model.folded(), images, seed))
            if effect < MATTERS:
                return None
        for path in sorted(bundle.glob("*.onnx")):
            proto = onnx.load(path)
            if change(proto):
                onnx.save(proto, path)
        return effect

    for name in IN_MODEL:
        yield name, lambda bundle, name=name: in_model(name, bundle)  # type: ignore[misc]
    for name in IN_GRAPH:
        yield name, lambda bundle, name=name: in_graph(name, bundle)  # type: ignore[misc]


def state(module: torch.nn.Module) -> dict[str, Array]:
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    """Parameters and buffers by name."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
