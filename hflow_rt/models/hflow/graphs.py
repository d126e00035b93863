"""What export writes for hflow: both directions, the bound, and the end flow alone, which maps the end vector."""

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hflow_rt.layers.equalized import EqualizedConv2d, EqualizedLinear
from hflow_rt.models.family import GraphSpec, TensorSpec
from hflow_rt.models.flow_graphs import flow_graphs
from hflow_rt.models.hflow.bound import bound_shapes

if TYPE_CHECKING:
    from hflow_rt.models.hflow.network import HFlow

__all__ = ["graphs"]

# In float16 where precision is mixed: coupling nets and decoders, but not the layers that yield scales and shifts.
# Encoders make the flow's targets, so they stay.
_NETS = ("*.couplings.*.net.*", "*.decoder.*")
_HEADS = ("*.net.scale_out.*", "*.net.shift_out.*", "*.decoder.*_shift.out.*", "*.decoder.*_log_scale.out.*")


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
    terms = [
        f"{name}.{part}"
        for name in model.latent_shapes()
        for part in ("prior", "log_det", "bins" if name == "z0" else "entropy")
    ]
    specs = flow_graphs(model, folded, bound_shapes(model), terms)
    ends = tuple(spec for spec in specs["forward"].inputs if spec.name.startswith("end"))
    parts = tuple(TensorSpec(f"u{i}", (channels,), "value") for i, channels in enumerate(model.config.end.channels))
    specs["end_forward"] = GraphSpec("end_forward", _EndForward(folded), _EndForward(model), ends, parts)
    specs["end_inverse"] = GraphSpec("end_inverse", _EndInverse(folded), _EndInverse(model), parts, ends)
    layers = (module for module in model.modules() if isinstance(module, (EqualizedConv2d, EqualizedLinear)))
    gains = tuple({layer.weight_scale for layer in layers})
    return {name: dataclasses.replace(spec, nets=_NETS, heads=_HEADS, gains=gains) for name, spec in specs.items()}
