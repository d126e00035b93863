"""What export writes for Glow: both directions and the bound; a model of classes takes `labels` as an input."""

import copy
import dataclasses
from typing import TYPE_CHECKING

from hflow_rt.models.family import GraphSpec
from hflow_rt.models.flow_graphs import flow_graphs
from hflow_rt.models.glow.coupling import HiddenConv2d, ZeroConv2d

if TYPE_CHECKING:
    from hflow_rt.models.glow.network import Glow

__all__ = ["graphs"]

# In float16 where precision is mixed: the subnets of couplings, but not what yields shifts and scales
_NETS = ("*.couplings.*.net.*",)
_HEADS = ("*.couplings.*.net.4.*",)


def graphs(model: "Glow") -> dict[str, GraphSpec]:
    """Folded graphs by name."""
    terms = [f"{name}.{part}" for name in model.latent_shapes() for part in ("prior", "log_det")]
    specs = flow_graphs(model, model.folded(), terms=[*terms, "z0.bins"])
    layers = [copy.deepcopy(m).double() for m in model.modules() if isinstance(m, (HiddenConv2d, ZeroConv2d))]
    gains = tuple(layer.gain().detach().cpu().numpy() for layer in layers)
    return {name: dataclasses.replace(spec, nets=_NETS, heads=_HEADS, gains=gains) for name, spec in specs.items()}
