"""Every error a user can cause.

HFlowError
├── ConfigError         a setting is impossible or unknown
├── DataError           images or latents cannot be read or do not fit
├── CheckpointError     weights cannot be read or do not fit the model
├── BundleError         an exported bundle is missing, changed or incomplete
├── BackendUnavailable  the asked-for backend, provider or device is not there
├── EngineMismatch      an engine was built for another machine, version or graph
├── ParityError         an engine does not compute what the reference computes
├── OutOfMemory         what was asked for does not fit into the machine or the GPU
├── TrainingError       training cannot go on (NaN, no images, ...)
└── NoInverse           the family has no such route

A message is one line: what must hold, what was found, what to do. The command line prints it and exits 1;
anything that is not an `HFlowError` is a bug and shows its traceback.

>>> import hflow_rt
>>> try:
...     hflow_rt.load("nowhere")
... except hflow_rt.errors.HFlowError as error:
...     print(error)
nowhere does not exist; name a run, a bundle or one of ...
"""

__all__ = [
    "BackendUnavailable",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineMismatch",
    "HFlowError",
    "NoInverse",
    "OutOfMemory",
    "ParityError",
    "TrainingError",
]


class HFlowError(Exception):
    """Base of everything that is the input's fault and not ours."""


class ConfigError(HFlowError):
    """A setting is impossible or unknown."""


class DataError(HFlowError):
    """Images or latents cannot be read or do not fit."""


class CheckpointError(HFlowError):
    """Weights cannot be read or do not fit the model."""


class BundleError(HFlowError):
    """An exported bundle is missing, changed or incomplete."""


class BackendUnavailable(HFlowError):  # noqa: N818 - the design's name
    """The backend, provider or device that was asked for is not there."""


class EngineMismatch(HFlowError):  # noqa: N818 - the design's name
    """An engine was built for another machine, version or graph."""


class ParityError(HFlowError):
    """An engine does not compute what the reference computes."""


class OutOfMemory(HFlowError):  # noqa: N818 - as torch calls it
    """What was asked for does not fit into the memory there is."""


class TrainingError(HFlowError):
    """Training cannot go on."""


class NoInverse(HFlowError):  # noqa: N818 - the design's name
    """The family has no such route; the message says what to use instead."""
