"""Legends, marks, colour bars, vector files and fonts: what a reader of a figure needs besides its picture."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evengaze
from evengaze.errors import DataError
from evengaze.layout import ImageInfo, VisualLayout, VisualTokens
from evengaze.trace import RowTrace, StageTrace, Trace
from evengaze.viz import fonts
from evengaze.viz.bias import plot_heat_maps
from evengaze.viz.compare import Compared, plot_comparison
from evengaze.viz.overlay import plot_trace
from evengaze.viz.style import RIGHT, WRONG, new_figure, save, title

SQUARE = Image.new("RGB", (64, 64), (200, 200, 200))


def trace_of(infos, kept, *, padding=None, recycled=None) -> Trace:
    count = sum(i.cells * i.frames for i in infos)
    tokens = VisualTokens.build(torch.arange(3, 3 + count), infos, padding=padding)
    row = RowTrace(torch.arange(count), torch.tensor(kept), recycled, None, None, None)
    layout = VisualLayout((tokens,))
    stages = [StageTrace(2, "previous", [row])]
    return Trace({"method": "fastv", "debias": None}, layout, count + 5, stages, [9] * 4, [0] * 4, [1] * 4)


def legend(figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_the_legend_names_the_marks_that_occur_and_no_others() -> None:
    assert legend(plot_trace(trace_of([ImageInfo((2, 2))], [3]), SQUARE)) == ["kept", "dropped"]
    padding = torch.tensor([0.0, 0.0, 1.0, 1.0])
    figure = plot_trace(trace_of([ImageInfo((2, 2))], [0, 3], padding=padding, recycled=torch.tensor([1])), SQUARE)
    assert legend(figure) == [
        "kept",
        "dropped",
        "kept, but padding",
        "padding, dropped",
        "stands for merged tokens",
    ]


def test_right_and_wrong_answers_are_marked() -> None:
    trace = trace_of([ImageInfo((2, 2))], [3])
    runs = [[Compared("a", trace, "blue", True)], [Compared("b", trace, "red", False)], [Compared("c", trace, "red")]]
    figure = plot_comparison(runs, SQUARE, question="what color?", dense="blue", right="blue")
    heads = {ax.get_title(loc="left"): ax._left_title.get_color() for ax in figure.axes}
    assert heads["\u2713 a"] == RIGHT and heads["\u2717 b"] == WRONG and "c" in heads
    assert legend(figure)[-2:] == ["right", "wrong"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"row": 1}, "1 rows; there is no"),
        ({"row": -2}, "no row -2"),
        ({"stage": 1}, "no stage 1"),
        ({"picture": 1}, "no number 1"),
    ],
)
def test_what_is_not_there_to_compare_is_said(wrong: dict[str, int], message: str) -> None:
    runs = [[Compared("a", trace_of([ImageInfo((2, 2))], [3]))]]
    with pytest.raises(DataError, match=message):
        plot_comparison(runs, SQUARE, **wrong)


def test_the_second_picture_of_a_comparison_is_the_second_one_that_was_given() -> None:
    """Not the second view of the first picture, such as its tiles beside a thumbnail."""
    infos = [ImageInfo((2, 2)), ImageInfo((2, 2), part=1), ImageInfo((1, 3))]
    trace = trace_of(infos, [8, 9])
    figure = plot_comparison([[Compared("a", trace)]], SQUARE, picture=1)
    assert "2 of 3 kept" in " ".join(text.get_text() for ax in figure.axes for text in ax.texts)


def test_long_names_are_smaller_and_whole() -> None:
    name = "pyramiddrop:keep=[0.5,0.25,0.125],layers=[2,10,20],mode=official"
    runs = [[Compared(text, trace_of([ImageInfo((2, 2))], [3]))] for text in (name, "fastv")]
    figure = plot_comparison(runs, SQUARE)
    figure.draw_without_rendering()
    titles = {ax.get_title(loc="left"): ax._left_title for ax in figure.axes}
    boxes = {text: one.get_window_extent() for text, one in titles.items()}
    assert boxes[name].x1 <= boxes["fastv"].x0 and titles[name].get_fontsize() < titles["fastv"].get_fontsize()


def test_heat_maps_have_colour_bars_relative_to_the_mean() -> None:
    scores = np.array([[1.0, 1.0], [3.0, 3.0]])
    figure = plot_heat_maps({0: scores, 1: 10 * scores})
    maps = [ax for ax in figure.axes if ax.images]
    assert len(figure.axes) - len(maps) == 2 and "relative" in figure.get_supxlabel()
    assert all(np.allclose(ax.images[0].get_array(), scores / 2) for ax in maps)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2), tuple(range(32))])
def test_layers_have_whole_numbers_and_a_line_for_even(layers: tuple[int, ...]) -> None:
    from evengaze.calibration.measures import Measure
    from evengaze.viz.bias import plot_layers

    figure = plot_layers({k: {"kept_index": Measure(0.6, 0.55, 0.65, 0.5, 9, True)} for k in layers})
    figure.draw_without_rendering()
    (ax,) = [ax for ax in figure.axes if ax.lines]
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks) and (low, high) == (layers[0] - 0.5, layers[-1] + 0.5)
    assert max(line.get_xdata()[-1] - line.get_xdata()[0] for line in ax.lines if len(line.get_xdata())) >= 1
    assert legend(figure) == ["even", "plain"]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_equal_figures_give_equal_files(ending: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        figure = plot_trace(trace_of([ImageInfo((2, 2))], [3]), SQUARE)
        assert save(figure, tmp_path / f"{name}.png", (ending,)) == [tmp_path / f"{name}.{ending}"]
    one, other = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("a", "b"))
    assert len(one) > 1000 and one == other


def test_several_formats_and_the_one_of_the_ending(tmp_path: Path) -> None:
    figure = new_figure(2, 2)
    assert [p.name for p in save(figure, tmp_path / "x.png", ("png", "pdf"))] == ["x.png", "x.pdf"]
    assert save(figure, tmp_path / "y.svg") == [tmp_path / "y.svg"] and (tmp_path / "y.svg").read_text().startswith("<")


def test_a_figure_that_cannot_be_written_is_one_of_our_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        save(new_figure(1, 1), tmp_path / "file" / "x.png")


def test_figures_are_made_and_saved_in_one_place() -> None:
    source = Path(evengaze.__file__).parent
    for call in ("savefig(", "Figure(figsize"):
        assert [p.name for p in source.rglob("*.py") if call in p.read_text(encoding="utf-8")] == ["style.py"]


# -- fonts -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def only_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_installed", lambda: ())
    fonts._warn.cache_clear()


def test_characters_without_a_font_are_boxes_with_one_warning(only_default: None, tmp_path: Path) -> None:
    text = "what is \u65b9\u5757\u5728\u54ea\u91cc?"
    with pytest.warns(fonts.FontWarning, match="fonts-noto-cjk") as found:
        assert fonts.drawable(text) == ("what is " + 5 * fonts.MISSING + "?", [fonts.DEFAULT])
        fonts.drawable(text)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = new_figure(2, 2)
        title(figure.subplots(), text, text)
        save(figure, tmp_path / "boxes.png")


def test_a_font_that_has_them_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {fonts.DEFAULT: "default", "Far Eastern": "east", "Other": "other"}
    known = {"default": frozenset(map(ord, "abc")), "east": frozenset({0x65B9}), "other": frozenset({0x5757})}
    monkeypatch.setattr(fonts, "_files", lambda: files)
    monkeypatch.setattr(fonts, "_installed", lambda: ("Far Eastern", "Other"))
    monkeypatch.setattr(fonts, "_characters", lambda path: known[path])
    assert fonts.drawable("abc") == ("abc", [fonts.DEFAULT])
    assert fonts.drawable("a\u65b9") == ("a\u65b9", [fonts.DEFAULT, "Far Eastern"])
    assert fonts.drawable("\u5757\u65b9") == ("\u5757\u65b9", [fonts.DEFAULT, "Far Eastern", "Other"])


def test_the_installed_fonts_can_be_read() -> None:
    assert fonts.DEFAULT in fonts._files() and ord("a") in fonts._characters(fonts._files()[fonts.DEFAULT])
    assert not [name for name in fonts._files() if name.lower().startswith("last resort")]
