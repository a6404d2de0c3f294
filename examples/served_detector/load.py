"""Measures the server on this machine: requests per second, latency, and its memory over many requests.

python load.py detector.onnx --library deformkit_onnxruntime.so
"""

import argparse
import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
from PIL import Image


@contextmanager
def served(*arguments: str, seconds: float = 60) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address and the process of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(__file__).with_name("server.py"))
    process = subprocess.Popen([sys.executable, program, *arguments, "--port", str(port)])
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + seconds
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start; exit status {process.poll()}")
            time.sleep(0.05)
        yield url, process
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def picture(size: int = 64) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def resident(process: subprocess.Popen[bytes]) -> float:
    """Memory of a process in MiB."""
    (line,) = (v for v in Path(f"/proc/{process.pid}/status").read_text().splitlines() if v.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def ask(url: str, clients: int, requests: int) -> tuple[float, list[float], int]:
    """Seconds in all, the latencies of ``requests`` requests, and how many were refused."""
    body, latencies, refused = picture(), [], 0
    left = iter(range(requests))

    async def client() -> None:
        nonlocal refused
        async with httpx.AsyncClient(timeout=60) as session:
            for _ in left:
                start = time.perf_counter()
                answer = await session.post(f"{url}/detect", content=body, headers={"Content-Type": "image/png"})
                latencies.append(time.perf_counter() - start)
                refused += answer.status_code == 503
                assert answer.status_code in (200, 503), answer.text

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, latencies, refused


def main(model: Path, library: Path | None, requests: int, many: int) -> None:
    with served(str(model), *(["--library", str(library)] if library else [])) as (url, process):
        asyncio.run(ask(url, 1, 20))
        print("| clients | requests / s | median | 95th percentile | refused |\n| --- | --- | --- | --- | --- |")
        for clients in (1, 8, 32):
            seconds, latencies, refused = asyncio.run(ask(url, clients, requests))
            median, most = (1000 * np.quantile(latencies, q) for q in (0.5, 0.95))
            print(f"| {clients} | {requests / seconds:.0f} | {median:.1f} ms | {most:.1f} ms | {refused} |", flush=True)
        print(f"memory: {resident(process):.0f} MiB", end="", flush=True)
        for part in range(1, 5):
            asyncio.run(ask(url, 8, many // 4))
            print(f", {resident(process):.0f} MiB after {many // 4 * part} requests", end="", flush=True)
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--library", type=Path, help="given to the server")
    parser.add_argument("--requests", type=int, default=500, help="for each number of clients")
    parser.add_argument("--many", type=int, default=10_000, help="requests over which memory is watched")
    main(**vars(parser.parse_args()))
