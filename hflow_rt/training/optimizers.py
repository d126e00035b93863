"""The optimizers of a plan, and which parameters a run trains by the groups that have learning rates of their own."""

import fnmatch
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hflow_rt.errors import ConfigError
from hflow_rt.models.plan import TrainingPlan
from hflow_rt.training.config import RunConfig, TrainingConfig

__all__ = ["Groups", "build_optimizers", "named_parameters", "trained_groups"]

Groups = dict[str, dict[str, list[nn.Parameter]]]  # by optimizer and group


def named_parameters(plan: TrainingPlan) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the plan; those of the model are called as in its file."""
    for name, parameter in plan.named_parameters():
        yield name.removeprefix("model."), parameter


def trained_groups(config: RunConfig, plan: TrainingPlan) -> Groups:
    """The plan's parameter groups without what is frozen, which gets no gradient from here on.

    Every setting by group or optimizer must name one, and every pattern of frozen names must fit one. Raises
    `ConfigError`.
    """
    groups = plan.groups()
    names = [name for by_group in groups.values() for name in by_group]
    training = config.training
    for field in ("learning_rates", "decay_factors", "final_rates", "cut_images"):
        _check_names(config, field, "parameter group", names)
    _check_names(config, "optimizers", "optimizer", list(groups))
    missing = [name for name in names if name not in training.learning_rates]
    if missing:
        raise ConfigError(f"training.learning_rates must name every parameter group; missing: {', '.join(missing)}")
    parameters = list(named_parameters(plan))
    for pattern in training.frozen:
        fitting = [parameter for name, parameter in parameters if fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise ConfigError(f"training.frozen: '{pattern}' fits no parameter, such as '{parameters[0][0]}'")
        for parameter in fitting:
            parameter.requires_grad_(False)
    trained = {
        optimizer: {name: [p for p in group if p.requires_grad] for name, group in by_group.items()}
        for optimizer, by_group in groups.items()
    }
    if not any(any(by_group.values()) for by_group in trained.values()):
        raise ConfigError("training.frozen leaves nothing to train; freeze less")
    kept = {
        optimizer: {name: group for name, group in by_group.items() if group} for optimizer, by_group in trained.items()
    }
    return {optimizer: by_group for optimizer, by_group in kept.items() if by_group}


def build_optimizers(config: TrainingConfig, groups: Groups, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    """An optimizer for each entry of `groups`; its parameter groups have their name beside their parameters."""
    return {name: _build(config, name, by_group, device) for name, by_group in groups.items()}


def _build(
    config: TrainingConfig, name: str, by_group: Mapping[str, list[nn.Parameter]], device: torch.device
) -> torch.optim.Optimizer:
    settings = config.optimizer_settings(name).model_dump()
    kind = settings.pop("kind")
    named = [{"params": parameters, "name": group} for group, parameters in by_group.items()]
    if kind == "adamax":
        return torch.optim.Adamax(named, **settings)
    return torch.optim.Adam(named, **settings, fused=device.type in ("cpu", "cuda"))


def _check_names(config: RunConfig, field: str, what: str, known: list[str]) -> None:
    for name in getattr(config.training, field):
        if name not in known:
            raise ConfigError(
                f"training.{field}.{name} names no {what}; family '{config.family}' has {', '.join(known)}"
            )
