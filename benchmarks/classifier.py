"""A small CNN that judges samples: its label accuracy and its features (`benchmarks.quality`).

    python -m benchmarks.classifier --out classifier.safetensors

It is trained on the real training images only and prints its accuracy on the real test images.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdiff import data

FEATURES = 128


class Classifier(nn.Module):
    """Three convolutions and two linear layers, about 0.4 million parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(128 * 16, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(0.25), nn.Linear(FEATURES, classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(N, classes)` and features `(N, FEATURES)` of images `(N, 1, 32, 32)`."""
        features = self.body(x)
        return self.head(features), features


def batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@torch.no_grad()
def judge(model: Classifier, images: Tensor, size: int = 500) -> tuple[Tensor, Tensor]:
    """Predicted labels `(N,)` and features `(N, FEATURES)`, float64, of images in [-1, 1]."""
    model.eval()
    parts = [model(images[part]) for part in batches(len(images), size)]
    labels = torch.cat([logits.argmax(dim=1) for logits, _ in parts])
    return labels, torch.cat([features for _, features in parts]).double()


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Shift the whole batch by up to two pixels each way; the border is black as the images'."""
    dy, dx = torch.randint(0, 5, (2,), generator=draw).tolist()
    size = images.shape[-1]
    return F.pad(images, (2, 2, 2, 2), value=-1.0)[..., dy : dy + size, dx : dx + size]


def train(folder: str | Path, epochs: int, seed: int = 0) -> tuple[Classifier, float]:
    """Train on the training split; returns the model and its accuracy on the test split."""
    images, labels = data.fashion_mnist("train", folder)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02, fused=True)
    size = 128
    total, step, start = epochs * math.ceil(len(images) / size), 0, time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=draw)
        for part in batches(len(images), size):
            share = step / total
            rate = 3e-3 * min(share / 0.2, (1 - share) / 0.8)
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = augment(images[order[part]], draw).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits, _ = model(x)
            loss = F.cross_entropy(logits.float(), labels[order[part]], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        minutes = (time.perf_counter() - start) / 60
        print(f"epoch {epoch + 1} loss {loss.item():.3f} minutes {minutes:.1f}", flush=True)
    test_images, test_labels = data.fashion_mnist("test", folder)
    predicted, _ = judge(model, test_images)
    return model, (predicted == test_labels).double().mean().item()


def load(path: str | Path) -> tuple[Classifier, float]:
    """A classifier that `main` saved, and its test accuracy."""
    weights = load_file(path)
    accuracy = weights.pop("test_accuracy").item()
    model = Classifier()
    model.load_state_dict(weights)
    return model.eval(), accuracy


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="classifier.safetensors")
    parser.add_argument("--data", default=str(data.DEFAULT_FOLDER))
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    model, accuracy = train(args.data, args.epochs)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file({**state, "test_accuracy": torch.tensor(accuracy, dtype=torch.float64)}, args.out)
    print(f"test accuracy {accuracy:.4f}, written to {args.out}")


if __name__ == "__main__":
    main()
