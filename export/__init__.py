"""From a trained model to a bundle of engines that are proved to be that model.

The package is also the function: `hflow_rt.export("runs/my-run")` is `hflow_rt.export.public.export`. Python gives the
name of a package in its parent to the package as soon as anything of it is imported, so that a function cannot keep it.
"""

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from hflow_rt.export.public import export

        return export(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        """For `help` and `inspect.signature`."""
        import inspect

        from hflow_rt.export.public import export

        return inspect.signature(export)


sys.modules[__name__].__class__ = _Package
