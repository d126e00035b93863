"""Kernels prove themselves before they are trusted.

The first time that an operator meets a GPU, driver, torch or Triton, it is held against plain torch in float64 on the
inputs of `proof_cases`: results, log-determinants and gradients. What passes is kept in the cache folder, so the next
process runs it without a proof; what fails raises `BackendUnavailable`, in this process every time, and is tried again
by the next one, because a failure is rare, must be seen, and may have been the machine's.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from hflow_rt.errors import BackendUnavailable
from hflow_rt.kernels import dispatch
from hflow_rt.kernels.proof_cases import PROOFS, largest_difference
from hflow_rt.kernels.proof_records import Environment, Record, environment, keep, recall

__all__ = ["Standing", "prove", "standings"]

_lock = threading.Lock()  # one proof at a time; a thread that waits for it finds what it found
_here = threading.local()  # `proving` in the thread of a proof, whose own launches are not to be proved
_records: dict[tuple[str, torch.device], Record] = {}  # of this process


def prove(operator: str, device: torch.device) -> None:
    """Return if `operator` is proved on `device`, by now or before; else raise `BackendUnavailable`.

    Neither the caller's modes nor its generators matter or change, as a proof runs in a thread of its own. While a CUDA
    graph is captured nothing can be proved, and what is not yet proved raises. Lack of memory proves nothing and is
    raised as it is.
    """
    if getattr(_here, "proving", False):
        return
    with _lock:
        record = _records.get((operator, device))
        if record is None:
            record = _known(operator, environment(device)) or _made(operator, device)
            _records[operator, device] = record
    if record.failure:
        raise BackendUnavailable(
            f"kernel '{operator}' {record.failure}, on {record.environment}; set {dispatch.OFF_SWITCH}={operator} to "
            f"run plain torch in its place, or {dispatch.SWITCH}=reference to run it everywhere"
        )
    dispatch._proved.add((operator, -1 if device.index is None else device.index))  # as `Tensor.get_device` has it


def _known(operator: str, where: Environment) -> Record | None:
    record = recall(operator, where)
    return None if record is None or record.failure else record


def _made(operator: str, device: torch.device) -> Record:
    if _capturing(device):
        raise BackendUnavailable(
            f"kernel '{operator}' is not yet proved on this GPU, and cannot be while a CUDA graph is captured; "
            "run once before the capture, or run 'hflow-rt doctor'"
        )
    with ThreadPoolExecutor(1) as pool:
        failure = pool.submit(_failure, operator, device).result()
    record = Record(operator, environment(device), datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), failure)
    keep(record)
    return record


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _failure(operator: str, device: torch.device) -> str:
    """What is wrong with the kernels of `operator`, in words; nothing if they are right."""
    _here.proving = True
    try:
        worst = largest_difference(PROOFS[operator], device)
    except Exception as error:  # compilers, loaders and drivers raise whatever they like
        if _lacks_memory(error):
            raise
        why = str(error).strip().splitlines() or ["no message"]
        return f"does not run ({type(error).__name__}: {why[0]})"
    if worst.share <= 1:
        return ""
    allowed = f"of the largest value where {worst.tolerance:.2g} is allowed"
    return f"computes wrong: {worst.what} is off by {worst.off:.2g} {allowed}"


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)  # Triton's own has no type


@dataclass(frozen=True)
class Standing:
    """What is known of an operator on a GPU.

    state: proved, FAILED, off (by `HFLOW_RT_KERNELS_OFF`) or not yet. date: of the proof, UTC. why: it failed, or is
    not proved yet.
    """

    operator: str
    state: str
    date: str
    why: str
    environment: Environment


def standings(say: Callable[[str], None] = lambda text: None) -> Iterator[Standing]:
    """Every operator on every kind of GPU here, proved first where it is not yet and the kernels are live.

    `say` hears what is being proved. Yields nothing where there is no GPU.
    """
    kinds: dict[Environment, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        kinds.setdefault(environment(torch.device("cuda", index)), torch.device("cuda", index))
    for where, device in kinds.items():
        for operator in dispatch.OPERATORS:
            yield _standing(operator, device, where, say)


def _standing(operator: str, device: torch.device, where: Environment, say: Callable[[str], None]) -> Standing:
    if dispatch.off(operator):
        return Standing(operator, "off", "", "", where)
    why = dispatch.missing()
    if why is None:
        if _known(operator, where) is None:
            say(f"proving {operator} on {where.gpu}")
        try:
            prove(operator, device)
        except BackendUnavailable:  # which the record tells
            pass
        except Exception as error:
            if not _lacks_memory(error):
                raise
            why = "the GPU is out of memory"
    record = _records.get((operator, device)) or recall(operator, where)
    if record is None:
        return Standing(operator, "not yet", "", why or "", where)
    if record.failure:
        remedy = f"{record.failure}; set {dispatch.OFF_SWITCH}={operator}"
        return Standing(operator, "FAILED", record.date, remedy, where)
    return Standing(operator, "proved", record.date, "", where)
