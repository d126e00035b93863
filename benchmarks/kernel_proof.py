"""What it costs that an operator is proved where it first meets a GPU."""

import time

import torch
from measuring import Report

from hflow_rt.kernels import dispatch
from hflow_rt.kernels.proof_cases import PROOFS, largest_difference

__all__ = ["time_proofs"]


def time_proofs(report: Report, device: str) -> None:
    """A row an operator: seconds of its proof as kernels are compiled, and again, and how much of a tolerance it took.

    Triton keeps what it has compiled, so the first figure is of a machine that is new, or of one that is not.
    """
    for operator, proof in PROOFS.items():
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            with dispatch.using("triton"):
                difference = largest_difference(proof, torch.device(device))
            seconds.append(f"{time.perf_counter() - started:.3f}")
        found = {"first s": seconds[0], "again s": seconds[1], "of tolerance": f"{difference.share:.0%}"}
        report.add(f"proof of {operator}", "kernels", **found)
