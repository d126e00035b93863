"""Which parameters a run trains, by the groups that have learning rates of their own."""

import fnmatch

from torch import nn

from hflow_rt.errors import ConfigError
from hflow_rt.models.family import LatentModel
from hflow_rt.training.config import RunConfig

__all__ = ["trained_groups"]


def trained_groups(config: RunConfig, model: LatentModel) -> dict[str, list[nn.Parameter]]:
    """The model's parameter groups without what is frozen, which gets no gradient from here on.

    Every setting by group must name one, and every pattern of frozen names must fit one. Raises `ConfigError`.
    """
    groups = model.parameter_groups()
    training = config.training
    for field in ("learning_rates", "decay_factors", "cut_images"):
        for name in getattr(training, field):
            if name not in groups:
                known = ", ".join(groups)
                raise ConfigError(
                    f"training.{field}.{name} names no parameter group; family '{config.family}' has {known}"
                )
    missing = [name for name in groups if name not in training.learning_rates]
    if missing:
        raise ConfigError(f"training.learning_rates must name every parameter group; missing: {', '.join(missing)}")
    parameters = dict(model.named_parameters())
    for pattern in training.frozen:
        fitting = fnmatch.filter(parameters, pattern)
        if not fitting:
            raise ConfigError(f"training.frozen: '{pattern}' fits no parameter, such as '{next(iter(parameters))}'")
        for name in fitting:
            parameters[name].requires_grad_(False)
    trained = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
    if not any(trained.values()):
        raise ConfigError("training.frozen leaves nothing to train; freeze less")
    return {name: group for name, group in trained.items() if group}
