"""hflow-rt: train latent-variable image models, export them, run them, and prove the engines are the model.

>>> import hflow_rt
>>> session = hflow_rt.load()
>>> images = session.read("photo.png")
>>> latents = session.inverse(images).latents
>>> again = session.forward(latents)

What is here is imported when it is first used, so that `import hflow_rt` takes no time and needs no package.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["Client", "Session", "check", "errors", "export", "load", "pretrained", "train"]

if TYPE_CHECKING:
    from hflow_rt import errors as errors
    from hflow_rt.assets import pretrained as pretrained
    from hflow_rt.export.opening import load as load
    from hflow_rt.export.public import check as check
    from hflow_rt.export.public import export as export
    from hflow_rt.runtime.client import Client as Client
    from hflow_rt.runtime.session import Session as Session
    from hflow_rt.runtime.training import train as train
else:  # type checkers would take a module with `__getattr__` to have every name
    # Where each name is: the one place in this package that knows of others above it. `errors` and `export` are
    # modules; that of `export` can be called, see there.
    _HOMES = {
        "Client": "hflow_rt.runtime.client",
        "Session": "hflow_rt.runtime.session",
        "check": "hflow_rt.export.public",
        "load": "hflow_rt.export.opening",
        "pretrained": "hflow_rt.assets",
        "train": "hflow_rt.runtime.training",
    }

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        import importlib

        if name not in _HOMES:
            return importlib.import_module(f"{__name__}.{name}")
        found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return found

    def __dir__():
        return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
