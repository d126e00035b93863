"""`generators` is found by name; `refused` reads bytes as a model file and watches what that costs."""

import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from hflow_rt.errors import CheckpointError, ConfigError, HFlowError

sys.path.insert(0, str(Path(__file__).parent))

SECONDS, MEGABYTES = 10.0, 64.0


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Read bytes as a model file: one line of error that holds `parts`, nothing executed, little spent."""
    from generators import CLASSES

    from hflow_rt.foreign.states import read_weights

    monkeypatch.chdir(tmp_path)

    def check(content: bytes, *parts: str, reader: Callable[[Path], object] | None = None, measure: bool = True) -> str:
        path = tmp_path / "evil.bin"
        path.write_bytes(content)
        before, modules, started = set(os.listdir()), set(sys.modules), time.perf_counter()
        if measure:  # which makes many small objects slow
            tracemalloc.start()
        try:
            with pytest.raises(HFlowError) as caught:
                (reader or (lambda file: read_weights(file, CLASSES)))(path)
            peak = tracemalloc.get_traced_memory()[1] / 1e6 if measure else 0.0
        finally:
            tracemalloc.stop()
        assert isinstance(caught.value, (CheckpointError, ConfigError))
        message = str(caught.value)
        assert message.startswith(str(path))
        assert message.isprintable()
        assert len(message) < len(str(path)) + 400
        for part in parts:
            assert part in message
        assert set(os.listdir()) == before  # such as the file that `touch` would have made
        assert not (set(sys.modules) - modules) & {"nt", "antigravity", "this", "hflow", "hflow.network"}
        assert time.perf_counter() - started < SECONDS
        assert peak < MEGABYTES + 3 * len(content) / 1e6
        return message

    return check
