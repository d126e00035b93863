"""What export writes for hflow: both directions, the bound, and the end flow alone, which maps the end vector."""

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hflow_rt.layers.equalized import EqualizedConv2d, EqualizedLinear
from hflow_rt.models.family import GraphSpec, TensorSpec
from hflow_rt.models.hflow.bound import bound_shapes

if TYPE_CHECKING:
    from hflow_rt.models.hflow.network import HFlow

__all__ = ["graphs"]

# In float16 where precision is mixed: coupling nets and decoders, but not the layers that yield scales and shifts.
# Encoders make the flow's targets, so they stay.
_NETS = ("*.couplings.*.net.*", "*.decoder.*")
_HEADS = ("*.net.scale_out.*", "*.net.shift_out.*", "*.decoder.*_shift.out.*", "*.decoder.*_log_scale.out.*")


class _Forward(nn.Module):
    def __init__(self, model: "HFlow") -> None:
        super().__init__()
        self.model = model
        self.names = list(model.latent_shapes())

    def forward(self, *latents: Tensor) -> tuple[Tensor]:
        return (self.model.decode(dict(zip(self.names, latents, strict=True))),)


class _Inverse(nn.Module):
    def __init__(self, model: "HFlow") -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        encoding = self.model.encode(image)
        return (*encoding.latents.values(), encoding.log_prob)


class _Bound(nn.Module):
    def __init__(self, model: "HFlow", names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.bound_terms(dict(zip(self.names, inputs, strict=True))).values())


class _EndForward(nn.Module):
    def __init__(self, model: "HFlow") -> None:
        super().__init__()
        self.flow = model.end_flow

    def forward(self, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.value for part in self.flow.decode([z.flatten(1) for z in parts]))


class _EndInverse(nn.Module):
    def __init__(self, model: "HFlow") -> None:
        super().__init__()
        self.flow = model.end_flow

    def forward(self, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.value[:, :, None, None] for part in self.flow.encode(list(parts)))


def graphs(model: "HFlow") -> dict[str, GraphSpec]:
    """Folded graphs by name."""
    folded = model.folded()
    stds = model.prior_std()
    latents = tuple(TensorSpec(name, shape, "latent", std=stds[name]) for name, shape in model.latent_shapes().items())
    ends = tuple(spec for spec in latents if spec.name.startswith("end"))
    image = TensorSpec("image", (3, model.resolution, model.resolution), "image", (0.0, 1.0))
    parts = tuple(TensorSpec(f"u{i}", (channels,), "value") for i, channels in enumerate(model.config.end.channels))
    log_prob = TensorSpec("log_prob", (), "score")
    noises = (TensorSpec(name, shape, "noise") for name, shape in bound_shapes(model).items())
    drawn = (image, TensorSpec("uniform", image.shape, "uniform", (0.0, 1.0)), *noises)
    names = [spec.name for spec in drawn]
    terms = tuple(
        TensorSpec(f"{name}.{part}", (), "score")
        for name in model.latent_shapes()
        for part in ("prior", "log_det", "bins" if name == "z0" else "entropy")
    )
    specs = (
        GraphSpec("forward", _Forward(folded), _Forward(model), latents, (image,)),
        GraphSpec("inverse", _Inverse(folded), _Inverse(model), (image,), (*latents, log_prob)),
        GraphSpec("bound", _Bound(folded, names), _Bound(model, names), drawn, terms),
        GraphSpec("end_forward", _EndForward(folded), _EndForward(model), ends, parts),
        GraphSpec("end_inverse", _EndInverse(folded), _EndInverse(model), parts, ends),
    )
    layers = (module for module in model.modules() if isinstance(module, (EqualizedConv2d, EqualizedLinear)))
    scales = tuple({layer.weight_scale for layer in layers})
    return {spec.name: dataclasses.replace(spec, nets=_NETS, heads=_HEADS, scales=scales) for spec in specs}
