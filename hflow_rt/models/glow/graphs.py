"""What export writes for Glow: both directions and the bound; a model of classes takes `labels` as an input."""

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hflow_rt.models.family import GraphSpec, TensorSpec
from hflow_rt.models.glow.coupling import HiddenConv2d, ZeroConv2d

if TYPE_CHECKING:
    from hflow_rt.models.glow.network import Glow

__all__ = ["graphs"]

Specs = tuple[TensorSpec, ...]

# In float16 where precision is mixed: the subnets of couplings, but not what yields shifts and scales
_NETS = ("*.couplings.*.net.*",)
_HEADS = ("*.couplings.*.net.4.*",)


class _Forward(nn.Module):
    def __init__(self, model: "Glow", names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.model.decode(dict(zip(self.names, inputs, strict=True))),)


class _Inverse(nn.Module):
    def __init__(self, model: "Glow", names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        image, *conditions = inputs
        encoding = self.model.encode(image, dict(zip(self.names, conditions, strict=True)))
        return (*encoding.latents.values(), encoding.log_prob)


class _Bound(nn.Module):
    def __init__(self, model: "Glow", names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.bound_terms(dict(zip(self.names, inputs, strict=True))).values())


def graphs(model: "Glow") -> dict[str, GraphSpec]:
    """Folded graphs by name."""
    folded = model.folded()
    latents = tuple(TensorSpec(name, shape, "latent") for name, shape in model.latent_shapes().items())
    conditions = tuple(
        TensorSpec(name, (len(options),), "condition", (0.0, 1.0)) for name, options in model.choices().items()
    )
    image = TensorSpec("image", (3, model.resolution, model.resolution), "image", (0.0, 1.0))
    drawn = (image, TensorSpec("uniform", image.shape, "uniform", (0.0, 1.0)), *conditions)
    terms = [f"{name}.{part}" for name in model.latent_shapes() for part in ("prior", "log_det")]
    scores = tuple(TensorSpec(name, (), "score") for name in (*terms, "z0.bins"))

    def graph(name: str, of: Callable[..., nn.Module], inputs: Specs, outputs: Specs) -> GraphSpec:
        named = [spec.name for spec in inputs if spec.role != "image" or of is _Bound]
        return GraphSpec(name, of(folded, named), of(model, named), inputs, outputs)

    specs = (
        graph("forward", _Forward, (*latents, *conditions), (image,)),
        graph("inverse", _Inverse, (image, *conditions), (*latents, TensorSpec("log_prob", (), "score"))),
        graph("bound", _Bound, drawn, scores),
    )
    layers = [copy.deepcopy(m).double() for m in model.modules() if isinstance(m, (HiddenConv2d, ZeroConv2d))]
    scales = tuple(layer.gain().detach().cpu().numpy() for layer in layers)
    return {spec.name: dataclasses.replace(spec, nets=_NETS, heads=_HEADS, scales=scales) for spec in specs}
