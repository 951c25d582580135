"""Padding masks: the published formulas against recorded results and against Pillow, and the shares of the layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evengaze.debias import Debias, PaddingMask
from evengaze.errors import ConfigError, LayoutError
from evengaze.layout import ImageInfo, VisualLayout, VisualTokens

RECORDED = np.load(Path(__file__).parent / "data" / "masks.npz", allow_pickle=False)
RULES = {"unpad": PaddingMask(formula="unpad"), "bilinear": PaddingMask(formula="bilinear")} | {
    f"pad_thr{t}": PaddingMask(t, "pad") for t in (0.01, 0.2, 0.3, 0.5)
}


def row(size: tuple[int, int] | None, grid: int = 24) -> VisualTokens:
    sizes = None if size is None else [size]
    return VisualLayout.from_spans([(5, 5 + grid * grid)], (grid, grid), image_sizes=sizes).rows[0]


@pytest.mark.parametrize("grid", [24, 8])
@pytest.mark.parametrize("rule", RULES)
def test_formulas_equal_the_official_masks(rule: str, grid: int) -> None:
    name, _, threshold = rule.partition("_")
    key = f"{name}_{grid}" + (f"_{threshold}" if threshold else "")
    for size, expected in zip(RECORDED["sizes_wh"].tolist(), RECORDED[key], strict=True):
        valid = RULES[rule].valid(row(tuple(size), grid))
        assert valid.tolist() == expected.astype(bool).tolist(), (rule, size)


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([5, 8, 14, 24, 27]))
@settings(max_examples=150, deadline=None)
def test_bilinear_equals_pillow(width: int, height: int, grid: int) -> None:
    side = max(width, height)
    picture = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    picture[top : top + height, left : left + width] = 1
    expected = np.asarray(Image.fromarray(picture).resize((grid, grid), Image.Resampling.BILINEAR)) >= 0.5
    lines = RULES["bilinear"].lines(ImageInfo((grid, grid), 1, (width, height)))
    assert lines == tuple(expected.ravel().tolist())


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([0.01, 0.3, 0.5]))
@settings(max_examples=150, deadline=None)
def test_shares_of_a_centred_square_agree_with_the_pad_formula(width: int, height: int, threshold: float) -> None:
    tokens = row((width, height))
    close = (tokens.padding - threshold).abs() < 1e-6
    same = PaddingMask(threshold).valid(tokens) == PaddingMask(threshold, "pad").valid(tokens)
    assert bool((same | close).all())


def test_a_patch_padded_to_exactly_the_threshold_is_picture() -> None:
    tokens = row((480, 460))  # margins of exactly half a patch
    assert PaddingMask(0.5).valid(tokens).all()
    assert PaddingMask(0.5, "pad").valid(tokens).all()
    assert PaddingMask(0.49).valid(tokens).sum() == 22 * 24


def test_survivors_images_and_frames_find_their_own_cells() -> None:
    layout = VisualLayout.from_spans([[(0, 16), (20, 52)]], [(4, 4), (4, 4)], image_sizes=[[(40, 20), (20, 40)]])
    tokens = layout.rows[0]
    mask = PaddingMask(formula="pad")
    valid = mask.valid(tokens)
    assert valid.tolist() == PaddingMask().valid(tokens).tolist()
    assert valid[:16].reshape(4, 4).all(1).tolist() == [False, True, True, False]
    assert valid[32:].reshape(4, 4).all(0).tolist() == [False, True, True, False]
    pick = torch.tensor([1, 5, 17, 40])
    assert mask.valid(tokens.take(pick)).tolist() == valid[pick].tolist()


def test_rows_without_images_have_nothing_to_mask() -> None:
    for rule in RULES.values():
        assert rule.valid(VisualTokens.empty()).shape == (0,)


def test_when_all_is_padding_the_mask_is_skipped_unless_official() -> None:
    tokens = row((1000, 30))
    debias = Debias(padding=PaddingMask(0.5, "pad"))
    score = torch.rand(576)
    corrected, allowed = debias(score, tokens)
    assert allowed.all() and torch.equal(corrected, score)
    zero, allowed = debias(score, tokens, official=True)
    assert allowed.all() and not zero.any()
    assert debias.valid(tokens).all() and not debias.valid(tokens, official=True).any()


@pytest.mark.parametrize("bad", [{"threshold": 1.0}, {"threshold": -0.1}, {"threshold": "x"}, {"formula": "area"}])
def test_bad_parameters(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PaddingMask(**bad)  # type: ignore[arg-type]


def test_unknown_sizes_are_an_error_that_names_the_fix() -> None:
    with pytest.raises(LayoutError, match="image_sizes"):
        PaddingMask(formula="unpad").valid(row(None))
    with pytest.raises(ConfigError, match="colour"):
        PaddingMask.from_dict({"colour": 3})
