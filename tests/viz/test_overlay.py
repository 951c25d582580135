"""Trace.plot: what is drawn is what was kept, on a picture that looks as the model saw it."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evengaze import Debias, FastV, PaddingMask
from evengaze.debias import Exponential
from evengaze.errors import DataError
from evengaze.layout import ImageInfo, VisualLayout, VisualTokens, square_padding
from evengaze.testing import tiny
from evengaze.trace import RowTrace, StageTrace, Trace
from evengaze.viz.overlay import plain_choice, plot_trace
from evengaze.viz.patches import FILL, Canvas, Drawing, as_seen, draw_panels


def trace_of(infos, kept, *, padding=None, raw=None, scores=None, debias=None, recycled=None):
    """A trace of one row with one stage."""
    count = sum(i.cells * i.frames for i in infos)
    tokens = VisualTokens.build(torch.arange(3, 3 + count), infos, padding=padding)
    row = RowTrace(torch.arange(count), torch.tensor(kept), recycled, None, raw, scores)
    pruner = {"method": "fastv", "debias": debias}
    return Trace(
        pruner, VisualLayout((tokens,)), count + 5, [StageTrace(2, "previous", [row])], [9] * 4, [0] * 4, [1] * 4
    )


def drawn(figure):
    """The title of each panel."""
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_a_wide_picture_is_padded_as_the_model_saw_it():
    picture = Image.new("RGB", (200, 100), (255, 0, 0))
    seen = as_seen(picture, square_padding((200, 100), (6, 6)).numpy())
    assert seen.shape[0] == seen.shape[1]
    side = seen.shape[0]
    assert tuple(seen[0, 0]) == FILL and tuple(seen[-1, -1]) == FILL
    red = (seen == (255, 0, 0)).all(2)
    rows = np.flatnonzero(red.any(1))
    assert abs(rows[0] - side / 4) <= 1 and abs(rows[-1] + 1 - side * 3 / 4) <= 1 and red[rows].all()


def test_padding_on_one_side_only_and_a_picture_that_is_padded_already():
    share = np.zeros((4, 4))
    share[3] = 1
    seen = as_seen(Image.new("RGB", (40, 30), (0, 0, 255)), share)
    assert tuple(seen[0, 0]) == (0, 0, 255) and tuple(seen[-1, 0]) == FILL
    square = as_seen(Image.new("RGB", (50, 50), (0, 0, 255)), square_padding((200, 60), (4, 4)).numpy())
    assert (square == (0, 0, 255)).all()


def test_without_padding_the_picture_takes_the_shape_of_the_grid():
    assert (
        as_seen(Image.new("RGB", (90, 100)), np.zeros((2, 6))).shape[1]
        == 3 * as_seen(Image.new("RGB", (90, 100)), np.zeros((2, 6))).shape[0]
    )


def test_kept_patches_are_bright_and_dropped_ones_dim():
    trace = trace_of([ImageInfo((2, 2))], [3])
    figure = plot_trace(trace, Image.new("RGB", (64, 64), (200, 200, 200)))
    assert drawn(figure) == ["as the model saw it", "fastv, layer 2"]
    pixels = np.asarray(figure.axes[1].images[0].get_array())
    assert tuple(pixels[-1, -1]) == (200, 200, 200)
    assert max(pixels[0, 0]) < 110


def test_what_was_debiased_is_the_first_stage_that_reads_attention():
    """Not the first stage: patches may have left the tower before (iLLaVA). What reads none is never debiased."""
    raw, scores = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    one = trace_of([ImageInfo((2, 2))], [0, 1], raw=raw, scores=scores, debias=Debias(padding=PaddingMask()).to_dict())
    (ranked,) = one.stages
    tower = dataclasses.replace(ranked, attention=None)
    for stages, at in (([tower, ranked], 1), ([tower, ranked, ranked], -2)):
        assert plain_choice(dataclasses.replace(one, stages=stages), stage=at).tolist() == [2, 3]
    for stages, at in (([tower], 0), ([tower, ranked], 0), ([ranked, ranked], 1), ([tower, ranked, ranked], 2)):
        assert plain_choice(dataclasses.replace(one, stages=stages), stage=at) is None


def test_the_choice_without_debiasing_is_the_best_by_raw_score_among_all():
    raw = torch.tensor([0.1, 0.2, 0.3, 0.4])
    padding = torch.tensor([0.0, 0.0, 0.0, 1.0])
    trace = trace_of([ImageInfo((2, 2))], [1, 2], padding=padding, raw=raw, scores=raw, debias={"padding": {}})
    assert plain_choice(trace).tolist() == [2, 3]
    figure = plot_trace(trace, Image.new("RGB", (10, 10)))
    assert drawn(figure) == ["as the model saw it", "fastv, plain", "fastv, debiased"]
    assert any("1 of them padding" in t.get_text() for t in figure.axes[1].texts)
    assert any("0 of them padding" in t.get_text() for t in figure.axes[2].texts)


def test_no_second_panel_where_nothing_was_debiased():
    raw = torch.rand(4)
    assert plain_choice(trace_of([ImageInfo((2, 2))], [1], raw=raw, scores=raw)) is None
    without_mask = {"padding": None, "trend": None}
    assert plain_choice(trace_of([ImageInfo((2, 2))], [1], raw=raw, scores=raw, debias=without_mask)) is None


def test_several_pictures_frames_and_recycled_tokens():
    infos = [ImageInfo((2, 2)), ImageInfo((2, 3), frames=5)]
    trace = trace_of(infos, [0, 4, 9, 33], recycled=torch.tensor([12]))
    assert len(plot_trace(trace).axes[0].images) == 1
    video = plot_trace(trace, [Image.new("RGB", (30, 20))] * 5, picture=1)
    assert [len(ax.images) for ax in video.axes] == [5, 5]
    assert Canvas.of(trace.layout.rows[0], None, 1).mask(torch.tensor([33])).nonzero() == ([4], [1], [2])
    with pytest.raises(DataError, match="5 frames, but 1"):
        plot_trace(trace, Image.new("RGB", (30, 20)), picture=1)
    with pytest.raises(DataError, match="no number 2"):
        plot_trace(trace, picture=2)
    with pytest.raises(DataError, match="no stage 1"):
        plot_trace(trace, stage=1)


def test_a_picture_in_tiles_is_cut_into_them():
    infos = [ImageInfo((2, 2), frames=7)]  # 2 x 3 tiles and the whole
    tiles = VisualTokens.build(torch.arange(28), infos, x=torch.arange(28) / 28)
    picture = Image.new("RGB", (60, 40), (0, 0, 255))
    picture.paste((255, 0, 0), (20, 20, 40, 40))
    canvas = Canvas.of(tiles, picture)
    assert canvas.across == 3 and len(canvas.pixels) == 7
    assert [tuple(p[p.shape[0] // 2, p.shape[1] // 2]) == (255, 0, 0) for p in canvas.pixels[:6]].index(True) == 4
    video = VisualTokens.build(torch.arange(28), infos)
    with pytest.raises(DataError, match="7 frames, but 1"):
        Canvas.of(video, picture)


@pytest.mark.parametrize("family", ["internvl", "idefics3", "llava_next", "qwen2_vl", "gemma3"])
def test_other_families_can_be_plotted(family, tmp_path):
    model, inputs = tiny(family)
    with FastV(keep=4, layer=2)(model) as run:
        model(**inputs)
    run.trace.plot(Image.new("RGB", (80, 50))).savefig(tmp_path / "kept.png")


def test_grids_with_missing_tokens_are_drawn():
    full = VisualTokens.build(torch.arange(9), [ImageInfo((3, 3))])
    part = full.take(torch.tensor([0, 1, 3, 8]))
    assert int(Canvas.of(part).there.sum()) == 4


def test_a_real_call_can_be_plotted_without_pyplot(tmp_path):
    model, inputs = tiny("llava", batch=2)
    debias = Debias(padding=PaddingMask(), trend=Exponential(2.0))
    with FastV(keep=4, layer=2, debias=debias)(model) as run:
        model(**inputs)
    figure = run.trace.plot(Image.new("RGB", (30, 20)), row=1)
    figure.savefig(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 1000
    assert len(drawn(figure)) == 3
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (3, 4)])
def test_titles_are_inside_of_the_figure(rows, columns):
    trace = trace_of([ImageInfo((6, 6))], [0, 7])
    panel = Drawing(Canvas.of(trace.layout.rows[0]), "plain: star", "2 of 36 kept", torch.tensor([0, 7]), right=True)
    figure = draw_panels([[panel] * columns] * rows, height=2.4)
    figure.draw_without_rendering()
    top = max(ax._left_title.get_window_extent().y1 for ax in figure.axes)
    assert top <= figure.bbox.y1
