"""Serves an ONNX detector over HTTP, without PyTorch.

python server.py detector.onnx --port 8000
curl --data-binary @digits.png -H "Content-Type: image/png" http://127.0.0.1:8000/detect

The model takes ``images [B, C, H, W]`` in 0 .. 1, with C = 1 or 3 and fixed H and W, and gives ``boxes [B, Q, 4]`` as
(x0, y0, x1, y1) in 0 .. 1, ``scores [B, Q]`` and ``labels [B, Q]``.
"""

import argparse
import asyncio
import os
import sys
import warnings
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from PIL import Image, UnidentifiedImageError

MOST_BYTES = 4 * 2**20
MOST_PIXELS = 4096 * 4096
SECONDS_TO_SEND = 10


class Detector:
    """The model in ONNX Runtime."""

    def __init__(self, model: Path, threads: int = 1, library: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if library:
            options.register_custom_ops_library(str(library))
        self.session = onnxruntime.InferenceSession(str(model), options)
        self.input = self.session.get_inputs()[0]
        _, self.channels, self.height, self.width = self.input.shape
        if self.channels not in (1, 3) or not isinstance(self.height, int) or not isinstance(self.width, int):
            raise ValueError(
                f"the model takes images of shape {self.input.shape}; it must be [B, 1 or 3, height, width]"
            )

    def __call__(self, image: Image.Image, threshold: float) -> dict[str, Any]:
        """Boxes in pixels of ``image``, the surest first."""
        resized = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized, np.float32) / 255
        pixels = pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)
        boxes, scores, labels = (found[0] for found in self.session.run(None, {self.input.name: pixels[None]}))
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= threshold]
        boxes = boxes[order].clip(0, 1) * np.array([*image.size, *image.size], np.float32)
        return {"boxes": boxes.tolist(), "scores": scores[order].tolist(), "labels": labels[order].tolist()}


def read_image(body: bytes, mode: str) -> Image.Image:
    """A PNG or JPEG file; ``mode`` is that of Pillow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(body), formats=("PNG", "JPEG"))
        # The header alone has been read so far.
        _check_size(*image.size)
        return image.convert(mode)
    except UnidentifiedImageError as error:
        raise HTTPException(400, "the body is no PNG or JPEG file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise HTTPException(413, f"the image has more than {MOST_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise HTTPException(400, f"the image cannot be read: {error}") from error


def read_array(body: bytes, mode: str) -> Image.Image:
    """A file of ``numpy.save`` with bytes ``[H, W]`` or ``[H, W, 3]``."""
    file = BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = headers[version](file)
    except (KeyError, ValueError) as error:
        raise HTTPException(400, f"the body is no file of numpy.save: {error}") from error
    if dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
        raise HTTPException(400, f"the array is {dtype} {list(shape)}; it must be uint8 [H, W] or [H, W, 3]")
    _check_size(shape[1], shape[0])
    if len(body) - file.tell() != prod(shape):
        raise HTTPException(400, f"the array has {len(body) - file.tell()} bytes; its shape needs {prod(shape)}")
    return Image.fromarray(np.load(BytesIO(body), allow_pickle=False)).convert(mode)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise HTTPException(400, f"the image has {width} x {height} pixels; it must have at least 1 x 1")
    if width * height > MOST_PIXELS:
        raise HTTPException(413, f"the image has {width} x {height} pixels; at most {MOST_PIXELS} are accepted")


READERS: dict[str, Callable[[bytes, str], Image.Image]] = {
    "image/png": read_image,
    "image/jpeg": read_image,
    "application/x-npy": read_array,
}


@dataclass
class Workers:
    """Threads that answer at most ``most`` requests, including those that wait; more are refused."""

    pool: ThreadPoolExecutor
    most: int
    busy: int = 0

    async def run(self, work: Callable[[], Any]) -> Any:
        if self.busy >= self.most:
            raise HTTPException(503, f"{self.busy} requests are being answered; try later", {"Retry-After": "1"})
        self.busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        finally:
            self.busy -= 1


async def read_body(request: Request) -> bytes:
    """The body, of which no more than the limit is read."""
    refused = HTTPException(413, f"the body has more than {MOST_BYTES} bytes")
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > MOST_BYTES:
        raise refused

    async def receive() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise refused
        return bytes(body)

    try:
        body = await asyncio.wait_for(receive(), SECONDS_TO_SEND)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {SECONDS_TO_SEND} seconds") from error
    if not body:
        raise HTTPException(400, "the body is empty")
    return body


def application(detector: Detector, workers: int = 2, waiting: int = 32) -> FastAPI:
    """The routes; ``workers`` images are answered at the same time, and ``waiting`` more are kept."""
    hands = Workers(ThreadPoolExecutor(workers), workers + waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        hands.pool.shutdown()

    app = FastAPI(title="detector", lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "busy": hands.busy, "torch": "torch" in sys.modules}

    @app.post("/detect")
    async def detect(request: Request, threshold: float = Query(0.5, ge=0, le=1)) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in READERS:
            raise HTTPException(415, f"Content-Type is {kind!r}; it must be one of {', '.join(READERS)}")
        body, mode = await read_body(request), "L" if detector.channels == 1 else "RGB"
        return await hands.run(lambda: detector(READERS[kind](body, mode), threshold))

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="images that are answered at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads for each image")
    parser.add_argument("--waiting", type=int, default=32, help="images that may wait; more are refused with 503")
    parser.add_argument("--library", type=Path, help="deformkit_onnxruntime.so: run the model by deformkit's kernels")
    given = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    app = application(Detector(given.model, given.threads, given.library), given.workers, given.waiting)
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning", limit_concurrency=512)


if __name__ == "__main__":
    main()
