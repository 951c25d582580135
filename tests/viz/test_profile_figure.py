"""The figure of a profile: every method is named in full, and what was not measured is left out."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from evengaze.viz.profile import parts_figure

LONG = "pyramiddrop:keep=[0.5,0.25,0.125],layers=[8,16,24],debias=padding"


def row(method: str, batch: int, **changes: Any) -> dict[str, Any]:
    values = {
        "method": method,
        "variant": "",
        "batch": batch,
        "visual_tokens": 576,
        "text_tokens": 60,
        "new_tokens": 16,
        "device": "a device with a long name, as vendors give them to their devices",
        "dtype": "bfloat16",
        "model": "folder/" * 8,
        "tower_seconds": 0.008,
        "decoder_seconds": 0.022,
        "prefill_seconds": 0.03,
        "step_seconds": 0.02,
        "flops": 1.0,
    }
    return {**values, **changes}


def test_names_are_whole_and_inside_of_the_figure() -> None:
    nothing = {"tower_seconds": None, "decoder_seconds": None, "prefill_seconds": None}
    rows = [
        row("dense", 1),
        row(LONG, 1, variant="graphs", flops=0.3),
        row("dense", 1, variant="static", **nothing),
        row("dense", 8, **nothing),
        row("dense", 32, step_seconds=None),
    ]
    figure = parts_figure(rows)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    first, second, third = figure.axes
    assert [text.get_text() for text in first.texts] == ["dense", f"{LONG} + graphs"]
    assert "nothing could be measured" in second.get_title(loc="left") and len(third.patches) == 2
    assert first.patches[0].get_width() == 8 and first.patches[-1].get_width() == 15 * 20
    width = figure.bbox.width
    for text in [*first.texts, *figure.texts]:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= width
    marks = first.collections[0].get_offsets()
    assert [round(float(x), 3) for x, _ in marks] == [30.0, 8 + 0.3 * 22]
