"""Trains the detector of ``examples/detection_2d.py`` and writes it to an ONNX file with a dynamic batch.

python export.py --steps 600 --output detector.onnx
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import deformkit as dk

sys.path.append(str(Path(__file__).parents[1]))
from detection_2d import CANVAS, Detector, digits, evaluate, scenes, train


class Answer(nn.Module):
    """Images ``[B, 1, CANVAS, CANVAS]`` to boxes ``[B, Q, 4]`` as (x0, y0, x1, y1) in 0 .. 1, scores and labels."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, boxes = self.detector(images)[-1]
        scores, labels = logits.sigmoid().max(-1)
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        return torch.cat([centre - half, centre + half], -1), scores, labels


def main(steps: int = 600, seed: int = 0, output: str | Path = "detector.onnx") -> None:
    torch.manual_seed(seed)
    known, unknown = digits()
    held_out = scenes(unknown, 100)
    model = train("deformable", True, steps, seed, known, held_out).model.eval()
    print(f"average precision on held-out digits: {evaluate(model, held_out).average_precision:.1%}")
    report = dk.onnx.export(
        Answer(model).eval(),
        (torch.rand(2, 1, CANVAS, CANVAS),),
        output,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        input_names=["images"],
        output_names=["boxes", "scores", "labels"],
    )
    print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="how many batches to train with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("detector.onnx"))
    main(**vars(parser.parse_args()))
