"""Which launches differ in more than their sides."""

from typing import Any

from hflow_rt.kernels import report
from hflow_rt.kernels.dispatch import Launch


def but_for_sides(launch: Launch) -> tuple[Any, ...]:
    """The kernel, the types of its tensors, and what is switched on."""
    signature, constants, _, _ = report._specialised(launch)
    types = {name: kind for name, kind in signature.items() if kind[0] == "*"}
    switches = {name: str(value) for name, value in constants.items() if type(value) is not int}
    return launch.kernel.fn.__name__, *sorted((types | switches).items())


def tile(launch: Launch) -> int:
    """How large its constants make it."""
    _, constants, _, _ = report._specialised(launch)
    return sum(value for value in constants.values() if type(value) is int)
