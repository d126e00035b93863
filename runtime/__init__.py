"""Run exported models with numpy, Pillow and one engine; PyTorch is needed only by the `torch` backend.

>>> from hflow_rt.runtime import load
>>> images = load("runs/latest").sample(4, std=0.7)  # doctest: +SKIP
"""

from hflow_rt.runtime.backends import BACKENDS
from hflow_rt.runtime.session import Encoded, Session, load

__all__ = ["BACKENDS", "Encoded", "Session", "load"]
