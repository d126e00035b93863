"""Settings inside published snapshots: the arguments that networks were made with, in the words of the original."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.source import shown

__all__ = ["discriminator_settings", "generator_settings"]

_REFERENCE = re.compile(r"\$\{([\w.]{1,200})\}", re.ASCII)
_STEPS = 16  # of references to references
_EMBEDDING = {"const_emb_size", "random_emb_size", "use_diagonal", "use_cosine"}
_BOUND_ONLY = {"log_emb_size"}  # checked by the original, and used for nothing

# what must be so, for a network that this family computes; missing means off, or none
_REQUIRED: dict[str, Any] = {
    "fmm.enabled": True,
    "fmm.activation": "demod",
    "input.type": "coords",
    "use_noise": False,
    "coords.enabled": True,
    "coords.per_resolution": True,
    "coords.fallback": False,
    "coords.kernel_size": 1,
    "coords.coord_dim": 2,
}
# what else may stand there
_READ = {
    "": {"coords", "fmm", "input", "num_extra_convs", "upsampling_mode", "fmaps", "fp32", "mapping_net_n_layers"},
    "fmm": {"rank", "instance_norm"},
    "input": {"resolution", "coord_fuser_cfg"},
    "coords": {"res_configs", "use_full_cache", "low_res_cfg", "medium_res_cfg"},
}


class _Settings:
    """The tree of a generator, whose texts `${path}` mean what stands at a path from its root."""

    def __init__(self, root: Mapping[str, Any], file: str) -> None:
        self.root, self.file = root, file

    def at(self, path: str, default: Any = None) -> Any:
        """What stands at a dotted path, resolved."""
        value: Any = self.root
        for key in path.split("."):
            value = self.resolved(value)
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return self.resolved(value)

    def resolved(self, value: Any) -> Any:
        for _ in range(_STEPS):
            match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
            if match is None:
                return value
            value = self.root
            for key in match[1].split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
        raise CheckpointError(f"{self.file}: its settings refer to each other in a circle; give an intact file")

    def check(self) -> None:
        """Raise `CheckpointError` for what the original can do and this family does not."""
        for path, wanted in _REQUIRED.items():
            # missing is off, which is right for what must be off, and for numbers the only value there is
            found = self.at(path, False if isinstance(wanted, bool) else wanted)
            if found != wanted:
                raise self.refused(path, found, f"must be {wanted}")
        for path, names in _READ.items():
            known = names | {name.rpartition(".")[2] for name in _REQUIRED if name.rpartition(".")[0] == path}
            tree = self.at(path) if path else self.root
            for name, value in tree.items() if isinstance(tree, Mapping) else ():
                if name not in known and value not in (None, False, 0):
                    raise self.refused(f"{path}.{name}".lstrip("."), value, "is unknown")

    def refused(self, path: str, found: Any, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: its setting {shown(path)} {reason}, and is {shown(str(found))}; only networks of "
            "coordinates with factorised modulation are read"
        )

    def embeddings(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """By side of the grid."""
        listed = self.at("coords.res_configs")
        for side, entry in listed.items() if isinstance(listed, Mapping) else ():
            own = self.resolved(entry)
            if not isinstance(own, Mapping) or not str(side).isdecimal():
                raise self.refused("coords.res_configs", side, "must give settings by side")
            for name, value in own.items():
                if name not in _EMBEDDING | _BOUND_ONLY and value not in (None, False, 0):
                    raise self.refused(f"coords.res_configs.{side}.{name}", value, "is unknown")
            yield (
                int(side),
                {
                    "const": own.get("const_emb_size", 0),
                    "random": own.get("random_emb_size", 0),
                    "diagonal": own.get("use_diagonal", False),
                    "cosine": own.get("use_cosine", False),
                },
            )


def generator_settings(kwargs: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Ours, of the arguments of a published generator. Raises `CheckpointError`."""
    try:
        settings = _Settings(kwargs["cfg"], file)
        settings.check()
        mapping, synthesis = kwargs["mapping_kwargs"], kwargs["synthesis_kwargs"]
        if further := sorted(mapping.keys() - {"num_layers"}):
            raise settings.refused(f"mapping_kwargs.{further[0]}", mapping[further[0]], "is unknown")
        bilinear = settings.at("fmm.instance_norm", False)
        if settings.at("upsampling_mode", "nearest") != ("bilinear" if bilinear else "nearest"):
            raise settings.refused("upsampling_mode", settings.at("upsampling_mode"), "must fit fmm.instance_norm")
        input_side, side = settings.at("input.resolution"), kwargs["img_resolution"]
        return {
            "resolution": side,
            "channels": kwargs["img_channels"],
            "input_side": input_side,
            "upsampling": "bilinear" if bilinear else "nearest",
            "z_dim": kwargs["z_dim"],
            "w_dim": kwargs["w_dim"],
            "classes": tuple(map(str, range(min(kwargs["c_dim"], 1 << 16)))),
            "mapping_layers": mapping["num_layers"],
            "rank": settings.at("fmm.rank"),
            "channel_base": synthesis["channel_base"],
            "channel_max": synthesis["channel_max"],
            "extra_layers": settings.at("num_extra_convs", {}),
            # those below the grid of the input are listed too
            "embeddings": {at: own for at, own in settings.embeddings() if input_side <= at <= side},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} does not tell how its generator was made ({shown(str(error))}); give a published snapshot"
        ) from error


def discriminator_settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Ours, of the arguments of a published discriminator; what it does not say is left to the default."""
    epilogue = kwargs.get("epilogue_kwargs")
    group = epilogue.get("mbstd_group_size") if isinstance(epilogue, Mapping) else None
    found = {"channel_base": kwargs.get("channel_base"), "channel_max": kwargs.get("channel_max"), "group": group}
    return {name: value for name, value in found.items() if value is not None}
