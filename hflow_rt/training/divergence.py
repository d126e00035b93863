"""When a loss or a gradient is no longer a number: say where, and what to try."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from hflow_rt.errors import TrainingError
from hflow_rt.models.plan import Place
from hflow_rt.names import quoted
from hflow_rt.training.config import TrainingConfig

__all__ = ["TERM", "broken_values", "diverged"]

TERM = "terms/"  # starts the tag of each named part of a loss, such as a level


def broken_values(logged: Mapping[str, float]) -> list[str]:
    """`tag is value` for everything that is not finite; if parts of the loss are, only these."""
    broken = {tag: value for tag, value in logged.items() if not math.isfinite(value)}
    parts = {tag: value for tag, value in broken.items() if tag.startswith(TERM)}
    return [f"{tag.removeprefix(TERM)} is {value}" for tag, value in (parts or broken).items()]


def diverged(
    broken: list[str],
    parameters: Iterable[tuple[str, nn.Parameter]],
    place: Place,
    config: TrainingConfig,
    checkpoint: Path | None,
    remedies: Sequence[str] = (),
) -> TrainingError:
    """The error for a step that was not taken, with its number, the level at fault and a remedy.

    Where only the gradient is broken, its parameters are named. checkpoint: the last one, which is good.
    remedies: the family's own, beside those of the training settings.
    """
    what = ", ".join(broken[:4])
    if broken[0].startswith("gradient_norm"):
        gradients = [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
        names = [name for name, gradient in gradients if not bool(gradient.isfinite().all())]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        what = f"the gradient of {', '.join(names[:3]) or 'all parameters together'}{more} is not finite"
    after = f"go on with --resume {quoted(checkpoint)}" if checkpoint else "start again (there is no checkpoint yet)"
    rates = ", ".join(f"{name} {rate:g}" for name, rate in config.learning_rates.items())
    precision = "" if config.precision == "no" else " or training.precision=no"
    clip = "none" if config.grad_clip is None else f"{config.grad_clip:g}"
    return TrainingError(
        f"loss and gradients must stay finite: at step {place.step} ({place.images} images) {what}; "
        f"{after} and try lower training.learning_rates (now {rates}), a smaller training.grad_clip (now "
        f"{clip}){precision}{''.join(f', {remedy}' for remedy in remedies)}"
    )
