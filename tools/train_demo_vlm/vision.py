"""Stage 1: a small CLIP vision tower learns to say what every patch shows."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from evengaze.demo.scenes import COLORS, GRID, KINDS, PATCH, POSITIONS, SIDE

from . import data

CONFIG = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "projection_dim": 160,
    "image_size": SIDE,
    "patch_size": PATCH,
}


class PatchHeads(nn.Module):
    """Linear readouts of kind, colour and direction from a patch's features; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = (1 + len(KINDS), 1 + len(COLORS), len(POSITIONS))
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.out(self.norm(features)).float().split(self.sizes, -1)

    def loss(self, features: torch.Tensor, labels: data.Labels) -> torch.Tensor:
        kind, color, position = self(features)
        rare = torch.ones(self.sizes[0])
        rare[data.BACKGROUND] = 0.2  # nine patches in ten are background
        return (
            F.cross_entropy(kind.flatten(0, 1), labels.kind.flatten(), weight=rare)
            + 0.25 * F.cross_entropy(color.flatten(0, 1), labels.color.flatten(), weight=rare[: self.sizes[1]])
            + 0.1 * F.cross_entropy(position.flatten(0, 1), labels.position.flatten())
        )


class PatchConvolution(nn.Conv2d):
    """A convolution of disjoint patches as the matrix product that it is; much faster backwards on a CPU."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rows, columns = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
        return (patches @ self.weight.flatten(1).T).transpose(1, 2).unflatten(2, (rows, columns))


def speed_up(tower: CLIPVisionModel) -> None:
    """Same function and parameters, faster to train on a CPU."""
    tower.embeddings.patch_embedding.__class__ = PatchConvolution
    tower.set_attn_implementation("eager")


def make_tower(seed: int) -> CLIPVisionModel:
    torch.manual_seed(seed)
    tower = CLIPVisionModel(CLIPVisionConfig(**CONFIG))
    speed_up(tower)
    return tower


def trapezoid(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor: linear warm-up, constant, linear decay to 2 % over the last 40 %."""
    return min((step + 1) / warmup, 1.0, 0.02 + 0.98 * (steps - step) / (0.4 * steps))


def cosine(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor: linear warm-up, then a half cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = torch.tensor((step - warmup) / max(steps - warmup, 1))
    return float(0.02 + 0.49 * (1 + torch.cos(torch.pi * progress)))


def accuracy(tower: CLIPVisionModel, heads: PatchHeads, seed: int, images: int = 128) -> str:
    """Held-out accuracy on the patches that show something."""
    batch = data.scenes(*[(data.TRAIN, 9, seed, index) for index in range(images)])
    truth = data.labels(batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predictions = heads(tower(data.pixel_values(batch)).last_hidden_state[:, 1:])
    report = []
    for name, predicted in zip(("kind", "color", "position"), predictions, strict=True):
        wanted = getattr(truth, name)
        chosen = truth.on_thing & (wanted >= 0)
        report.append(f"{name} {(predicted.argmax(-1) == wanted)[chosen].float().mean():.3f}")
    digits = truth.on_thing & (truth.kind > len(KINDS) - 10)
    report.append(f"digit {(predictions[0].argmax(-1) == truth.kind)[digits].float().mean():.3f}")
    return ", ".join(report)


def run(args: argparse.Namespace) -> None:
    """Train the tower; resumes from the last checkpoint in `args.work`."""
    tower = make_tower(args.seed)
    heads = PatchHeads(tower.config.hidden_size)
    both = nn.ModuleList([tower, heads])
    optimizer = torch.optim.AdamW(both.parameters(), lr=args.rate, weight_decay=0.02, betas=(0.9, 0.98), fused=True)
    path, first = Path(args.work) / "vision.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        both.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    start = time.monotonic()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.rate * trapezoid(step, args.steps, 100)
        seeds = [(data.TRAIN, 0, args.seed, step * args.batch + row) for row in range(args.batch)]
        batch = data.scenes(*seeds)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(data.pixel_values(batch)).last_hidden_state
            assert features.shape[1] == 1 + GRID**2
            loss = heads.loss(features[:, 1:], data.labels(batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(
                f"step {step} loss {loss.item():.3f} {(time.monotonic() - start) / (step - first + 1):.2f} s/step",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            print(f"step {step + 1} held out: {accuracy(tower, heads, args.seed)}", flush=True)
            torch.save({"model": both.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path)
