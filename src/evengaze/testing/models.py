"""`tiny`: a random model of a family and inputs that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from evengaze.errors import ConfigError
from evengaze.layout import VisualLayout
from evengaze.testing.families import FAMILIES
from evengaze.testing.generic import GENERIC
from evengaze.testing.prompts import IMAGE, PAD, RESERVED, VIDEO, prompts


def families(*, video: bool = False, generic: bool = False) -> tuple[str, ...]:
    """Names that `tiny` knows and the installed transformers can run: of families with an adapter of their own, or of
    those that the generic one serves.

    Args:
        video: only those that take videos.
        generic: which of the two.
    """
    chosen = {name: f for name, f in (GENERIC if generic else FAMILIES).items() if f.runs}
    return tuple(name for name, f in chosen.items() if not video or f.videos is not None)


def bare(family: str) -> bool:
    """Whether a family is a text decoder, which needs a layout by hand."""
    return {**FAMILIES, **GENERIC}[family].bare


def skipped(family: str) -> tuple[str, ...]:
    """Which rows of the matrix a family lacks, and why; for people."""
    kind = {**FAMILIES, **GENERIC}[family]
    why = "a text decoder" if kind.bare else "the model takes none"
    return () if kind.videos is not None else (f"No video ({why})",)


def tiny(
    family: str,
    batch: int = 1,
    attention: str = "sdpa",
    *,
    images: int | Sequence[int] = 1,
    video: bool = False,
    side: Literal["left", "right"] = "left",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **text: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """A tiny random model and inputs for it.

    Args:
        family: one of `families()`; "llama" and others (`bare`) are decoders whose prompts hold stand-ins for image
            tokens (`layout_of` says where).
        batch: rows; their texts differ in content and length.
        attention: attention implementation.
        images: pictures in each row, or one number for each row (0 makes a row of text only).
        video: videos in place of images.
        side: where short rows are padded.
        dtype: of the weights and pixels.
        device: of weights and inputs, which are the same on every device.
        seed: of weights, texts and pixels.
        text: overrides of the text config, such as `num_hidden_layers=8`.

    Returns:
        The model in eval mode (no end token; special tokens are never generated) and the keyword arguments for its
        `generate` or forward.

    Raises:
        ConfigError: unknown family, or a video for a family without videos.
    """
    kind = FAMILIES.get(family, GENERIC.get(family))
    if kind is None:
        raise ConfigError(f"no tiny model of {family!r}; there are {', '.join((*FAMILIES, *GENERIC))}")
    make = kind.videos if video else kind.images
    if make is None:
        raise ConfigError(
            f"{family!r} takes no videos; those that do: "
            f"{', '.join((*families(video=True), *families(video=True, generic=True)))}"
        )
    config = kind.config(text)
    parts = {"": "eager", "vision_config": "eager", "text_config": attention}
    config._attn_implementation = parts if kind.eager_tower and attention != "eager" else attention
    # Tied weights would make a random model repeat its last token, whatever it saw.
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    model = kind.model(config)
    _seed_weights(model, seed)
    counts = [images] * batch if isinstance(images, int) else list(images)
    generator = torch.Generator().manual_seed(seed + 1)
    tokens, inputs = make(sum(counts), generator)
    queue = iter(tokens)
    rows = [[next(queue) for _ in range(n)] for n in counts]
    if kind.by_row and inputs:
        tiles = [sum(map(_tiles, row)) for row in rows]
        inputs = {name: _stack_rows(values, tiles) for name, values in inputs.items()}
    inputs = {**prompts(rows, side=side, seed=seed), **inputs}
    if kind.types is not None:
        inputs[kind.types[0]] = kind.types[1](inputs["input_ids"])
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    return model.to(device, dtype), inputs


def layout_of(inputs: dict[str, Tensor], grid: tuple[int, int] = (4, 4)) -> VisualLayout:
    """The layout of unbroken runs of placeholder tokens, for the bare decoder or as a cross-check.

    Args:
        inputs: with `input_ids`.
        grid: of every picture; a run must hold a multiple of its cells.
    """
    rows: list[list[tuple[int, int]]] = []
    for ids in inputs["input_ids"].tolist():
        visual = [0] + [int(t in (IMAGE, VIDEO)) for t in ids] + [0]
        edges = [i for i in range(len(ids) + 1) if visual[i] != visual[i + 1]]
        rows.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return VisualLayout.from_spans(rows, grid)


def _tiles(picture: list[int]) -> int:
    """Runs of placeholders in a picture's tokens."""
    return sum(a != IMAGE and b == IMAGE for a, b in pairwise([PAD, *picture]))


def _stack_rows(pixels: Tensor, counts: list[int]) -> Tensor:
    """(tiles, ...) as (rows, most tiles of a row, ...), filled up with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(torch.split(pixels, counts)), batch_first=True)


@torch.no_grad()
def _seed_weights(model: Any, seed: int) -> None:
    """Draw every parameter anew; large enough that attention is not flat and greedy tokens have clear margins."""
    generator = torch.Generator().manual_seed(seed)
    zero_centred = "gemma" in type(model).__name__.lower()
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() < 2:
            norm = "norm" in name and name.endswith("weight") and not zero_centred
            p.copy_(0.1 * noise + float(norm))
        elif "embed_tokens" in name:  # Gemma multiplies embeddings by the root of the width
            p.copy_((0.06 if zero_centred else 0.5) * noise)
        elif "embed" in name or "lm_head" in name:
            p.copy_(0.5 * noise)
        else:
            p.copy_((0.12 if "q_proj" in name or "k_proj" in name else 0.06) * noise)
    model.eval()
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, PAD
    settings.suppress_tokens = list(RESERVED)
