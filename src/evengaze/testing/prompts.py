"""Token sequences with placeholders, padded to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

VOCABULARY = 300
PAD, BOS = 0, 1
START, END = 280, 281
"""Mark the beginning and the end of an image, in families that have such tokens."""
IMAGE, VIDEO = 290, 291
RESERVED = (PAD, START, END, 282, 283, IMAGE, VIDEO)

_LENGTHS = ((3, 6), (3, 2), (6, 9), (2, 4))
"""Text tokens before the first and after the last image, row by row."""


def prompts(
    rows: Sequence[Sequence[Sequence[int]]], *, side: Literal["left", "right"] = "left", seed: int = 0
) -> dict[str, Tensor]:
    """Rows of text with pictures in between, no two alike.

    Args:
        rows: for every row the token sequences of its pictures; an empty list makes a row of text only.
        side: where short rows are padded.
        seed: of the text.

    Returns:
        `input_ids` and `attention_mask`, both (rows, longest row).
    """
    generator = torch.Generator().manual_seed(seed)

    def text(n: int) -> list[int]:
        return torch.randint(5, 250, (n,), generator=generator).tolist()

    sequences = []
    for b, pictures in enumerate(rows):
        before, after = _LENGTHS[b % len(_LENGTHS)]
        tokens = [BOS, *text(before)]
        for k, picture in enumerate(pictures):
            tokens += (text(2) if k else []) + list(picture)
        sequences.append(torch.tensor(tokens + text(after)))
    longest = max(map(len, sequences))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(sequences):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[b, where], mask[b, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}
