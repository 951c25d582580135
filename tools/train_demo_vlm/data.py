"""Batches of training scenes: pixels, and for every patch what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evengaze.demo.scenes import COLORS, GRID, KINDS, POSITIONS, Scene, make_scene, position_of

TRAIN = 1  # first number of every training seed; evaluation and calibration have their own (evengaze.demo.dataset)
IGNORE = -100
BACKGROUND = 0
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass(frozen=True)
class Labels:
    """What each patch shows, each of shape (batch, 196); `IGNORE` where it is padding or cannot be told."""

    kind: torch.Tensor
    color: torch.Tensor
    position: torch.Tensor

    @property
    def on_thing(self) -> torch.Tensor:
        return self.kind > BACKGROUND

    def of(self, rows: torch.Tensor) -> Labels:
        """The labels of some images, in that order."""
        return Labels(self.kind[rows], self.color[rows], self.position[rows])


def scenes(*seeds: tuple[int, ...], most: int = 6) -> list[Scene]:
    return [make_scene(*seed, most=most) for seed in seeds]


def pixel_values(batch: Sequence[Scene]) -> torch.Tensor:
    """What the processor makes of the pictures, shape (batch, 3, 112, 112)."""
    images = torch.from_numpy(np.stack([scene.padded() for scene in batch])).permute(0, 3, 1, 2)
    return (images / 255.0 - MEAN) / STD


def labels(batch: Sequence[Scene]) -> Labels:
    shape = (len(batch), GRID**2)
    kind, color, position = (np.full(shape, BACKGROUND), np.full(shape, BACKGROUND), np.full(shape, IGNORE))
    for row, scene in enumerate(batch):
        padding = scene.padding_share() > 0.5
        most = np.zeros(GRID**2, int)
        for thing in scene.things:
            covered = scene.coverage(thing)
            sliver = (covered > 0) & (covered < 8) & (most < 8)
            kind[row, sliver] = color[row, sliver] = IGNORE  # too little to say what it is
            shown = (covered >= 8) & (covered > most)
            kind[row, shown] = 1 + KINDS.index(thing.kind)
            color[row, shown] = 1 + COLORS.index(thing.color)
            where = position_of(thing)
            position[row, shown] = IGNORE if where is None else POSITIONS.index(where)
            most = np.maximum(most, covered)
        unlabelled = padding & (most < 8)
        kind[row, unlabelled] = color[row, unlabelled] = IGNORE
    return Labels(torch.from_numpy(kind), torch.from_numpy(color), torch.from_numpy(position))
