"""What options, manifests and reports choose among; readable in no time, for the sake of `--help`."""

from typing import Literal

__all__ = ["Precision", "Route", "Routes", "Tuning"]

Precision = Literal["fp32", "mixed"]
Tuning = Literal["any", "cpu"]
Route = Literal["forward", "inverse"]  # latents to image, image to latents
Routes = Literal["forward", "inverse", "both"]  # one by name, or all that a model has
