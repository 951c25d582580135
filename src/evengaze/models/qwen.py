"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native resolution, groups of merged patches, three-axis rotary positions.

Where their visual tokens are, which grids they form and deepstack are the generic adapter's; what is known beyond it is
what can be said of them.
"""

from __future__ import annotations

from typing import ClassVar

from evengaze.models.generic import Generic


class Qwen2VL(Generic):
    """Qwen2-VL and Qwen2.5-VL: pictures are resized to whole patches, never padded."""

    name = "Qwen2-VL / Qwen2.5-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    observed = False
    padding = "none: pictures are resized to whole groups of patches"
    limits = ("renumbered positions: three-axis rotary positions have no order without gaps; originals are kept",)
    mixes = "each visual token is merged from a group of patches"


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: adds features of inner tower layers to the visual tokens after the first decoder layers."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
