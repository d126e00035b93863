"""Whole numbers that people type, held to a range before anything is made of them."""

from hflow_rt.errors import DataError

__all__ = ["MOST", "check_count", "check_seed"]

MOST = 2**31 - 1  # images, frames, draws: more than anybody waits for, and what every array and file can count
_SEEDS = 2**64


def check_count(what: str, value: int, least: int = 1) -> None:
    """Raise `DataError` unless `value` lies in `least` .. `MOST`. what: in a sentence, such as `the batch`."""
    if value < least:
        raise DataError(f"{what} must be at least {least}, not {value}")
    if value > MOST:
        raise DataError(f"{what} must be at most {MOST:,}, not {value:,}")


def check_seed(seed: int) -> None:
    """Raise `DataError` unless `seed` is one that every random stream takes."""
    if not 0 <= seed < _SEEDS:
        raise DataError(f"seed must be in 0 .. 2^64 - 1; found {seed}; choose another")
