"""A test module with `FAMILY = "name"` and a `golden` argument runs once for every case and both precisions."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what tests share is found by name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from golden_cases import golden_cases

    if "golden" in metafunc.fixturenames:
        cases = golden_cases(metafunc.module.FAMILY)
        assert cases, f"no golden case of {metafunc.module.FAMILY} found beside {__file__}"
        metafunc.parametrize("golden", cases, ids=str)
