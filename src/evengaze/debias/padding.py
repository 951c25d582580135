"""Which visual tokens show padding instead of the picture.

Pictures that are not square are padded before the vision tower sees them, and the tokens of the padding attract
attention (arXiv 2508.17807, section on padding bias). `PaddingMask` says which tokens are left out of the ranking.

The default rule reads each token's share of padding from the layout, which the model's adapter takes from the pixels
themselves. The three other rules are those of the published patches, which only know the picture's size; all of them
take the picture as centred on a square (LLaVA's `expand2square`) and are kept for comparison with published results.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from operator import add
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from evengaze.errors import ConfigError, LayoutError
from evengaze.layout import ImageInfo, VisualTokens
from evengaze.parameters import coerce

Formula = Literal["share", "pad", "unpad", "bilinear"]

_SIDE = 336  # pixels of the square that the patches' formulas are written for; only its ratio to the grid matters
_FIXED = 22  # fraction bits of Pillow's 8-bit resampling coefficients


@dataclass(frozen=True)
class PaddingMask:
    """Marks the tokens that are padding.

    Attributes:
        threshold: a token is padding if more than this share of its patch is; one that is padded to exactly this
            share still counts as picture. Ignored by "unpad" and "bilinear".
        formula: where the share comes from:

            * "share" (default): `VisualTokens.padding`, measured on the pixels.
            * "pad": `generate_pad_mask` of the FastV, PyramidDrop, HiMAP and TokenCarve patches: the area of each patch
              outside a real-valued margin.
            * "unpad": `unpad_mask` of the FastV patch: the lines that LLaVA's `unpad_image` keeps.
            * "bilinear": the SparseVLM patch: a 0/1 picture, bilinearly resized to the grid by Pillow, from .5 on.
    """

    threshold: float = 0.5
    formula: Formula = "share"

    def __post_init__(self) -> None:
        if self.formula not in get_args(Formula):
            raise ConfigError(f"formula must be one of {', '.join(get_args(Formula))}, not {self.formula!r}")
        coerce(self)
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold} must be in [0, 1): the share of a patch that may be padding")

    def valid(self, tokens: VisualTokens) -> Tensor:
        """(n,) bool, False for tokens that are padding; all False if the picture is thinner than the grid can show.

        Raises:
            LayoutError: a formula other than "share" needs picture sizes that the layout does not have.
        """
        if self.formula == "share":
            # Shares are computed in floating point; an exact half must not become padding by its last bit.
            return tokens.padding <= self.threshold + 1e-9
        if len(tokens) == 0:
            return torch.ones(0, dtype=torch.bool, device=tokens.padding.device)
        if any(i.size is None for i in tokens.images) or not tokens.images:
            raise LayoutError(
                f"PaddingMask(formula={self.formula!r}) needs the size of each picture before it was padded, which "
                "this layout does not have. Use formula='share', or give image_sizes to VisualLayout.from_spans."
            )
        grids = [torch.tensor(self.lines(i), dtype=torch.bool) for i in tokens.images]
        offset = torch.tensor([0, *(i.cells for i in tokens.images)]).cumsum(0).to(tokens.image.device)
        return torch.cat(grids).to(tokens.image.device)[offset[tokens.image] + tokens.cell]

    def lines(self, image: ImageInfo) -> tuple[bool, ...]:
        """The mask of one picture's grid by one of the size formulas, row-major; True where the picture is.

        Raises:
            LayoutError: the picture has no size, or an impossible one.
        """
        if image.size is None or image.size[0] < 1 or image.size[1] < 1:
            raise LayoutError(f"a picture cannot have the size {image.size}")
        width, height = image.size
        rows, columns = image.grid
        wide = width > height
        count = rows if wide else columns
        if width == height:
            return (True,) * (rows * columns)
        short, long = min(width, height), max(width, height)
        if self.formula == "pad":
            line = _pad(short, long, count, float(self.threshold))
        elif self.formula == "unpad":
            line = _unpad(short, long, count)
        else:
            line = _bilinear(short, long, count)
        return tuple(v for v in line for _ in range(columns)) if wide else line * rows

    def to_dict(self) -> dict[str, Any]:
        """The parameters as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PaddingMask:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown parameter, or one of the wrong type or out of range.
        """
        unknown = set(values) - {"threshold", "formula"}
        if unknown:
            raise ConfigError(f"PaddingMask has no parameter {', '.join(sorted(map(str, unknown)))}")
        return cls(**values)


@lru_cache(maxsize=4096)
def _pad(short: int, long: int, count: int, threshold: float) -> tuple[bool, ...]:
    """`generate_pad_mask`: a line is padding if more than `threshold` of it is in a margin of real-valued width."""
    margin = (long - short) / (2 * long) * _SIDE
    patch = _SIDE / count
    shares = []
    for i in range(count):
        overlap = max(0.0, min(patch * i + patch, _SIDE - margin) - max(patch * i, margin))
        shares.append(1 - overlap / patch)
    return tuple(share <= threshold for share in shares)


@lru_cache(maxsize=4096)
def _unpad(short: int, long: int, count: int) -> tuple[bool, ...]:
    """`unpad_mask`: both margins are rounded down, so that one line too many stays when their sum is odd."""
    margin = (count - int(short * (count / long))) // 2
    return tuple(margin <= i < count - margin for i in range(count))


@lru_cache(maxsize=4096)
def _bilinear(short: int, long: int, count: int) -> tuple[bool, ...]:
    """Pillow's bilinear reduction of `long` pixels, `short` of them 1, to `count` lines, rounded to 0 or 1.

    The picture is pasted at the integer offset `(long - short) // 2`. Pillow resamples 8-bit images with coefficients
    rounded to 22 bits, so a line near one half depends on them; sums run in its order, in Python's doubles.
    """
    first = (long - short) // 2
    scale = long / count
    support = max(scale, 1.0)
    result = []
    for i in range(count):
        centre = (i + 0.5) * scale
        low, high = max(0, int(centre - support + 0.5)), min(long, int(centre + support + 0.5))
        taps = [max(0.0, 1.0 - abs((x - centre + 0.5) / support)) for x in range(low, high)]
        total = reduce(add, taps)  # sum() compensates rounding from Python 3.12 on, Pillow does not
        fixed = [int(0.5 + tap / total * (1 << _FIXED)) for tap in taps]
        inside = sum(k for x, k in enumerate(fixed, low) if first <= x < first + short)
        result.append(inside + (1 << (_FIXED - 1)) >= 1 << _FIXED)
    return tuple(result)
