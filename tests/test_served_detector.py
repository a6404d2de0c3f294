"""The server of examples/served_detector: its answers, what it refuses and why, and that it needs no torch."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit._kernels import selection

FOLDER = Path(__file__).parents[1] / "examples" / "served_detector"
for package in ("fastapi", "uvicorn", "httpx", "PIL", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


class Tiny(nn.Module):
    """A detector of this form: the first of two boxes spans the image, and is as sure as the image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = dk.nn.PackedDeformConv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bright = self.layer(images).mean((1, 2, 3))
        scores = torch.stack([bright, 1 - bright], 1)
        box = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]])
        return box.expand(images.shape[0], -1, -1) + 0 * scores[..., None], scores, (scores > 0.5).long() + 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str, Any]]:
    path = tmp_path_factory.mktemp("served") / "tiny.onnx"
    dk.onnx.export(
        Tiny().eval(),
        (torch.rand(2, 1, 8, 8),),
        path,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},),
    )
    sys.path.append(str(FOLDER))
    try:
        load = import_module("load")
        library = ["--library", dk.onnx.library()] if selection.path else []
        with load.served(str(path), "--workers", "1", "--waiting", "1", *library) as (url, process):
            yield load, url, process
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("load", None)


def file(pixels: Any, kind: str) -> bytes:
    from PIL import Image

    Image.fromarray(pixels).save(written := BytesIO(), kind)
    return written.getvalue()


def post(url: str, body: bytes, kind: str, query: str = "") -> Any:
    import httpx

    return httpx.post(f"{url}/detect{query}", content=body, headers={"Content-Type": kind}, timeout=30)


def saved(array: Any) -> bytes:
    import numpy

    numpy.save(written := BytesIO(), array)
    return written.getvalue()


def test_answers_without_torch(server: tuple[Any, str, Any]) -> None:
    import httpx
    import numpy

    _, url, process = server
    bright = numpy.full((20, 40), 204, numpy.uint8)
    for body, kind in (
        (file(bright, "PNG"), "image/png"),
        (file(bright, "JPEG"), "image/jpeg; charset=binary"),
        (saved(bright), "application/x-npy"),
        (file(numpy.stack([bright] * 3, -1), "PNG"), "image/png"),
    ):
        found = post(url, body, kind).json()
        assert found["boxes"] == [[0, 0, 40, 20]] and found["labels"] == [4]
        assert found["scores"] == pytest.approx([0.8], abs=1e-4)
    both = post(url, saved(bright), "application/x-npy", "?threshold=0.1").json()
    assert both["boxes"] == [[0, 0, 40, 20], [10, 10, 30, 20]] and both["labels"] == [4, 3]
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "busy": 0, "torch": False}
    if sys.platform == "linux":
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in mapped and ("deformkit_onnxruntime.so" in mapped) == (selection.path is not None)


def test_refuses_with_a_reason(server: tuple[Any, str, Any]) -> None:
    import httpx
    import numpy

    _, url, _ = server
    image = file(numpy.random.default_rng(0).integers(0, 256, (64, 64), numpy.uint8), "PNG")
    # One row of an image that claims to be larger than all memory.
    bomb = bytearray(image)
    bomb[16:24] = (2**16).to_bytes(4, "big") * 2
    bomb[29:33] = __import__("zlib").crc32(bomb[12:29]).to_bytes(4, "big")
    huge = saved(numpy.zeros((2, 2), numpy.uint8)).replace(b"(2, 2), ", b"(9**9,2)")
    long = saved(numpy.zeros((2, 2), numpy.uint8))
    refused = {
        "no PNG or JPEG": (400, b"hello", "image/png"),
        "the body is empty": (400, b"", "image/png"),
        "cannot be read": (400, image[:1500], "image/png"),
        "must be one of image/png": (415, image, "text/plain"),
        "'': ".rstrip(": "): (415, image, ""),
        "4194304 bytes": (413, bytes(5 * 2**20), "image/png"),
        "pixels": (413, bytes(bomb), "image/jpeg"),
        "no file of numpy.save": (400, image, "application/x-npy"),
        "numpy.save: ": (400, huge, "application/x-npy"),
        "bytes; its shape needs 4": (400, long[:-1], "application/x-npy"),
        "must be uint8": (400, saved(numpy.zeros((2, 2))), "application/x-npy"),
        "at least 1 x 1": (400, saved(numpy.zeros((0, 2), numpy.uint8)), "application/x-npy"),
    }
    for reason, (status, body, kind) in refused.items():
        answer = post(url, body, kind)
        assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), (reason, answer.text)
    assert post(url, image, "image/png", "?threshold=2").status_code == 422
    # Without a stated length the body is counted while it arrives.
    parts = (bytes(2**20) for _ in range(8))
    headers = {"Content-Type": "image/png"}
    assert httpx.post(f"{url}/detect", content=parts, headers=headers, timeout=30).status_code == 413
    assert httpx.get(f"{url}/health").json()["busy"] == 0


def test_a_flood_is_refused_and_the_server_ends(server: tuple[Any, str, Any]) -> None:
    load, url, process = server
    _, latencies, refused = asyncio.run(load.ask(url, 16, 64))
    assert len(latencies) == 64 and 0 < refused < 64
    _, _, refused = asyncio.run(load.ask(url, 1, 5))
    assert refused == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)
