"""Load on a served model: throughput and latency by number of clients, a server that is killed, malformed requests.

python benchmarks/serving_load.py [MODEL] [--seconds 5] > benchmarks/results/serving.md

On loopback, against the real server; see `triton_server` for what takes the place of NVIDIA's ONNX Runtime backend.
"""

import argparse
import re
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from triton_server import served

from hflow_rt.errors import BackendUnavailable, HFlowError
from hflow_rt.export.repository import write_repository
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import chosen_model, find_bundle
from hflow_rt.runtime.client import Client

CLIENTS = (1, 2, 4, 8, 16)


def direct(model: Path, seconds: float) -> str:
    """Images per second of a session in this process, one and 16 at a time."""
    session, found = load(model, device="cpu"), []
    for batch in (1, 16):
        latents = next(session.draw(range(batch), batch=batch))
        session.forward(latents)
        until, count = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            session.forward(latents)
            count += batch
        found.append(f"{count / seconds:.0f} images/s at {batch}")
    return ", ".join(found)


def loaded(address: str, latents: dict[str, np.ndarray], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Images per second, and the seconds that each request of one image took."""
    times: list[float] = []
    until = time.monotonic() + seconds

    def work() -> None:
        with Client(address, "m") as client:
            while time.monotonic() < until:
                began = time.monotonic()
                client.forward(latents)
                times.append(time.monotonic() - began)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(times) / seconds, times


def killed(models: Path, folder: Path, latents: dict[str, np.ndarray]) -> str:
    """Four clients, whose server ends in the middle and comes back."""
    counts = {"answered": 0, "refused in one sentence": 0, "anything else": 0, "answered afterwards": 0}
    back, over = threading.Event(), threading.Event()

    def work(address: str) -> None:
        client = Client(address, "m", timeout=20)
        while not over.is_set():
            was_back = back.is_set()
            try:
                client.forward(latents)
                counts["answered afterwards" if was_back else "answered"] += 1
            except BackendUnavailable:
                counts["refused in one sentence"] += 1
                time.sleep(0.1)
            except Exception:  # is what is counted here
                counts["anything else"] += 1

    with served(models, folder) as ports:
        threads = [threading.Thread(target=work, args=(f"127.0.0.1:{ports.grpc}",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(3)
    with served(models, folder, ports):
        back.set()
        time.sleep(5)
        over.set()
        for thread in threads:
            thread.join()
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def malformed(address: str, latents: dict[str, np.ndarray], number: int) -> str:
    """Requests of wrong names, shapes and types."""
    rng = np.random.default_rng(0)
    refused = 0
    with Client(address, "m") as client:
        grpc = client._grpc
        for _ in range(number):
            shape = [int(side) for side in rng.integers(0, 6, rng.integers(1, 5))]
            kind = ("FP32", "INT64")[rng.integers(2)]
            tensor = grpc.InferInput(str(rng.choice(["image", "z0", "", "x" * 5000])), shape, kind)
            tensor.set_data_from_numpy(np.zeros(shape, np.float32 if kind == "FP32" else np.int64))
            try:
                client._client.infer(str(rng.choice(["m_inverse", "m_forward", "m_sample", "none"])), [tensor])
            except grpc.InferenceServerException:
                refused += 1
        try:
            client.forward(latents)
        except HFlowError as error:
            return f"{refused:,} of {number:,} refused, then: {error}"
    return f"{refused:,} of {number:,} refused; the server answered the next request"


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=Path("hflow-emoji"))
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--malformed", type=int, default=10_000)
    asked = parser.parse_args()
    model = chosen_model(asked.model)[0]
    bundle = find_bundle(model)
    latents = next(load(model, device="cpu").draw([0]))
    print(f"# Load on `{bundle.path.name}_forward`, one image a request\n")
    print(f"Direct, in one process: {direct(model, asked.seconds)}.\n")
    print("| batching | clients | images/s | p50 ms | p99 ms |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batching in (True, False):
            models = folder / ("on" if batching else "off")
            write_repository(bundle, models, name="m")
            if not batching:
                config = models / "m_forward" / "config.pbtxt"
                config.write_text(re.sub(r"dynamic_batching \{[^}]*\}\n", "", config.read_text()))
            with served(models, folder) as ports:
                for clients in CLIENTS:
                    rate, times = loaded(f"127.0.0.1:{ports.grpc}", latents, clients, asked.seconds)
                    p50, p99 = 1000 * np.quantile(times, [0.5, 0.99])
                    print(
                        f"| {'on' if batching else 'off'} | {clients} | {rate:.0f} | {p50:.0f} | {p99:.0f} |",
                        flush=True,
                    )
                if batching:
                    refused = malformed(f"127.0.0.1:{ports.grpc}", latents, asked.malformed)
        print(f"\nServer ended and started again under four clients: {killed(folder / 'on', folder, latents)}.")
        print(f"\nMalformed requests: {refused}.")


if __name__ == "__main__":
    main()
