"""What the page must know of a model to show what can be done with it."""

from importlib.util import find_spec
from typing import Any

from hflow_rt import __version__
from hflow_rt.assets import is_installed, pretrained
from hflow_rt.errors import DataError
from hflow_rt.manifest import Loop
from hflow_rt.runtime.bundle import BUNDLE
from hflow_rt.runtime.latents.latent_views import space_of_slots
from hflow_rt.runtime.latents.operations import MODES
from hflow_rt.runtime.noise import parse_std
from hflow_rt.runtime.session import LATENT_SPACE, Session

__all__ = ["described"]


def described(session: Session) -> dict[str, Any]:
    """A JSON object; `said` is what finds the model again in commands and Python, where that needs to be said."""
    manifest, drawing, where = session.manifest, session.drawing, session.bundle.path
    stds = parse_std(session.std, drawing.scaled) if drawing.scaled else {}
    slots = space_of_slots(session)
    ranges = {tensor.name: tensor.range or (None, None) for tensor in drawing.inputs("control")}
    loop = manifest.routes.get("forward")
    return {
        "version": __version__,
        "name": where.parent.name if where.name == BUNDLE else where.name,
        # no path of this machine leaves it
        "said": "" if where == pretrained() else where.name if is_installed(where) else "MODEL",
        "family": manifest.family,
        "model": manifest.checkpoint.get("sha256", ""),
        "backend": session.backend,
        "verified": session.verified,
        "resolution": session.resolution,
        "channels": session.channels,
        "bits": session.bits,
        "latents": [
            {"name": level, "shape": list(session.input_shapes[level]), "std": stds.get(level)}
            for level in session.levels
        ],
        "controls": [
            {"name": control, "default": value, "low": ranges[control][0], "high": ranges[control][1]}
            for control, value in session.controls.items()
        ],
        "conditions": session.conditions,
        "steps": session.steps,
        "fewer_steps": isinstance(loop, Loop) and bool(loop.leads_to),
        "spaces": [space for space in session.spaces if space == LATENT_SPACE or _leads_on(session, space)],
        "latent_space": LATENT_SPACE,
        "modes": list(MODES),
        "slots": None if slots is None else next(iter(session.space_shapes(slots).values()))[0],
        "encodes": session.can("inverse"),
        "encodes_not": manifest.absent.get("inverse"),
        "projects": not session.can("inverse") and find_spec("torch") is not None,
    }


def _leads_on(session: Session, space: str) -> bool:
    """Whether the graphs of a space are in this bundle."""
    try:
        session.space_shapes(space)
    except DataError:
        return False
    return True
