"""The graphs that every model with an exact inverse has, written once: both routes and the bound."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hflow_rt.models.family import LOG_PROB, GraphSpec, TensorSpec

if TYPE_CHECKING:
    from hflow_rt.models.flow import FlowModel

__all__ = ["flow_graphs"]


class _Forward(nn.Module):
    def __init__(self, model: "FlowModel", names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.model.decode(dict(zip(self.names, inputs, strict=True))),)


class _Inverse(nn.Module):
    def __init__(self, model: "FlowModel", names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        encoding = self.model.encode(given.pop("image"), given)
        return (*encoding.latents.values(), encoding.log_prob)


class _Bound(nn.Module):
    def __init__(self, model: "FlowModel", names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.bound_terms(dict(zip(self.names, inputs, strict=True))).values())


def flow_graphs(
    model: "FlowModel",
    folded: "FlowModel",
    noises: Mapping[str, tuple[int, ...]] | None = None,
    terms: Sequence[str] = (),
) -> dict[str, GraphSpec]:
    """`forward`, `inverse` and, where its `terms` are named, `bound`.

    folded: what is written, where `model` is the reference. noises: standard normal inputs of the bound beside the
    image and its dequantisation noise, shapes by name. terms: names of `bound_terms` in order.
    """
    stds = model.prior_std()
    latents = [TensorSpec(name, shape, "latent", std=stds[name]) for name, shape in model.latent_shapes().items()]
    conditions = [
        TensorSpec(name, (len(options),), "condition", (0.0, 1.0)) for name, options in model.conditions().items()
    ]
    image = TensorSpec("image", (model.channels, model.resolution, model.resolution), "image", (0.0, 1.0))
    uniform = TensorSpec("uniform", image.shape, "uniform", (0.0, 1.0))
    drawn = [TensorSpec(name, shape, "noise") for name, shape in (noises or {}).items()]
    found: dict[str, GraphSpec] = {}

    def add(
        name: str, wrapper: type[_Forward | _Inverse | _Bound], inputs: list[TensorSpec], *outputs: TensorSpec
    ) -> None:
        names = [spec.name for spec in inputs]
        found[name] = GraphSpec(name, wrapper(folded, names), wrapper(model, names), tuple(inputs), outputs)

    add("forward", _Forward, [*latents, *conditions], image)
    add("inverse", _Inverse, [image, *conditions], *latents, TensorSpec(LOG_PROB, (), "score"))
    if terms:
        scores = [TensorSpec(name, (), "score") for name in terms]
        add("bound", _Bound, [image, uniform, *drawn, *conditions], *scores)
    return found
