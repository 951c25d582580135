"""From what was kept to files, pictures, pixels and attention columns."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import evengaze as eg
from evengaze.errors import DataError
from evengaze.layout import ImageInfo, VisualLayout, VisualTokens, square_padding
from evengaze.methods import get
from evengaze.pixels import patch_boxes, views
from evengaze.testing import tiny
from evengaze.testing.matrix import METHODS
from evengaze.trace import RowTrace, StageTrace, Trace
from evengaze.viz.patches import as_seen


def trace_of(infos, kept, **columns):
    tokens = VisualTokens.build(torch.arange(3, 3 + sum(i.cells * i.frames for i in infos)), infos, **columns)
    row = RowTrace(torch.arange(len(tokens)), torch.tensor(kept))
    stages = [StageTrace(2, "previous", [row])]
    return Trace({"method": "fastv"}, VisualLayout((tokens,)), len(tokens) + 5, stages, [9] * 4, [0] * 4, [1] * 4)


# -- files -----------------------------------------------------------------------------------------------------------
def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return a == b


@pytest.mark.parametrize("name", METHODS)
def test_a_trace_comes_back_from_its_file_as_it_was(name, tmp_path):
    model, inputs = tiny("llava", batch=3, images=[1, 0, 2])
    with get(name)(**METHODS[name])(model) as run:
        model(**inputs)
    run.trace.save(tmp_path / "trace.json")
    again = Trace.load(tmp_path / "trace.json")
    assert same(again.stages, run.trace.stages) and same(again.layout, run.trace.layout)
    assert same(again.columns(5), run.trace.columns(5))


def test_files_without_what_was_added_later_are_read_and_damaged_ones_refused():
    model, inputs = tiny("llava")
    with eg.ILLaVA(keep=5, layer=2)(model) as run:
        model(**inputs)
    data = json.loads(json.dumps(run.trace.to_dict()))
    row = data["stages"][0]["rows"][0]
    row["merge"].pop()
    for name in ("tokens", "place"):
        row.pop(name)
    old = Trace.from_dict(data)
    assert old.stages[0].rows[0].merge.weight.dtype == torch.float32
    with pytest.raises(DataError, match="older evengaze"):
        old.columns(3)
    for wrong in ("float99", "Tensor", 3):
        row["merge"][3:] = [wrong]
        with pytest.raises(DataError, match="malformed"):
            Trace.from_dict(data)


# -- pixels ----------------------------------------------------------------------------------------------------------
def area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def test_boxes_of_a_picture_that_was_padded_to_a_square():
    infos, padding = [ImageInfo((4, 4), size=(200, 100))], square_padding((200, 100), (4, 4)).flatten()
    trace = trace_of(infos, [4, 11, 0], padding=padding)
    assert trace.boxes().tolist() == [[0, 0, 50, 50], [150, 50, 200, 100], [0, 0, 50, 0]]
    shown = trace.mask()
    assert shown.shape == (100, 200) and int(shown.sum()) == 5000
    assert bool(shown[:50, :50].all()) and bool(shown[50:, 150:].all())
    assert trace.boxes(size=(400, 200), tokens=torch.tensor([11])).tolist() == [[300, 100, 400, 200]]


@pytest.mark.parametrize("size", [(200, 90), (61, 200), (100, 100), (337, 336)])
def test_a_box_holds_what_the_patch_shows(size):
    """Against the drawing of the picture as the model saw it, which pastes and resizes pixels."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    picture = small.resize(size, Image.Resampling.BILINEAR)
    share = square_padding(size, (8, 8))
    trace = trace_of([ImageInfo((8, 8))], list(range(64)), padding=share.flatten())
    seen = as_seen(picture, share.numpy())
    zoom = seen.shape[0] // 8
    pixels = np.asarray(picture).astype(float)
    for k, box in enumerate(trace.boxes(size=picture).tolist()):
        left, top, right, bottom = (round(v) for v in box)
        if share.flatten()[k] > 0:  # partly the fill colour
            continue
        row, column = divmod(k, 8)
        patch = seen[row * zoom : (row + 1) * zoom, column * zoom : (column + 1) * zoom]
        assert np.abs(pixels[top:bottom, left:right].mean((0, 1)) - patch.mean((0, 1))).max() < 8


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "idefics3", "qwen2_vl", "gemma3", "mistral3"])
def test_the_boxes_of_all_tokens_cover_the_picture(family):
    model, inputs = tiny(family, images=2)
    with eg.FastV(keep=4, layer=2)(model) as run:
        model(**inputs)
    table = run.trace.layout.rows[0]
    everything, kept = torch.arange(len(table)), 0
    for picture in range(sum(i.part == 0 for i in table.images)):
        size = (64, 48)
        assert bool(run.trace.mask(picture, size, tokens=everything).all())
        shown = views(table, picture)
        for k in shown:
            own = (table.image == k).nonzero().flatten()
            if table.images[k].frames == 1:
                assert float(area(patch_boxes(table, own, size)).sum()) == pytest.approx(64 * 48)
        boxes = run.trace.boxes(picture, size)
        assert bool((boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([64, 48])).all())
        kept += len(boxes)
    assert kept == len(run.trace.kept()) == 4


def test_boxes_of_tiles_and_of_frames():
    infos = [ImageInfo((2, 2), frames=7)]  # 2 x 3 tiles and the whole
    tiled = trace_of(infos, [0, 13, 24], x=torch.arange(28) / 28)
    assert tiled.boxes(size=(60, 40)).tolist() == [[0, 0, 10, 10], [10, 20, 20, 30], [0, 0, 30, 20]]
    assert tiled.mask(size=(60, 40)).shape == (40, 60)
    video = trace_of(infos, [0, 13])
    assert video.boxes(size=(60, 40)).tolist() == [[0, 0, 30, 20], [30, 0, 60, 20]]
    shown = video.mask(size=(60, 40))
    assert shown.shape == (7, 40, 60) and shown.flatten(1).sum(1).tolist() == [600, 0, 0, 600, 0, 0, 0]


def test_pictures_are_counted_as_the_user_has_them():
    infos = [ImageInfo((2, 2), size=(8, 8)), ImageInfo((4, 4), size=(8, 8), part=1), ImageInfo((2, 2))]
    trace = trace_of(infos, [0, 4, 21])
    assert trace.boxes(0).tolist() == [[0, 0, 4, 4], [0, 0, 2, 2]]
    assert trace.boxes(1, (10, 10)).tolist() == [[5, 0, 10, 5]]
    with pytest.raises(DataError, match="size of picture 1 in pixels is not known"):
        trace.boxes(1)
    with pytest.raises(DataError, match=r"2 pictures.*no number 2"):
        trace.mask(2)
    with pytest.raises(DataError, match="width, height"):
        trace.boxes(1, 640)


# -- attention columns -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_columns_say_which_token_each_state_belongs_to(name):
    """Layer by layer: the states of kept tokens are those that enter the same layer in another order of things."""
    model, inputs = tiny("llava", batch=3, images=[2, 0, 1])
    entered: dict[int, torch.Tensor] = {}

    def note(i):
        def hook(module, args, kwargs):
            entered[i] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

        return hook

    layers = model.model.language_model.layers
    pruner = get(name)(**METHODS[name])
    first = pruner.stages(6)[0].layer
    with torch.no_grad():
        hooks = [layers[first].register_forward_pre_hook(note(first), with_kwargs=True)]
        model(**inputs)
        dense = entered[first]
        hooks.pop().remove()
        with pruner(model) as run:
            hooks = [m.register_forward_pre_hook(note(i), with_kwargs=True) for i, m in enumerate(layers)]
            model(**inputs)
        for hook in hooks:
            hook.remove()
    for row, table in enumerate(run.trace.layout.rows):
        for layer in range(6):
            columns = run.trace.columns(layer, row)
            there = columns >= 0
            assert len(columns) == entered[layer].shape[1]
            assert int(there.sum()) == run.trace.visual_tokens(row)[layer]
        columns = run.trace.columns(first, row)
        decision = run.trace.stages[0].rows[row]
        merged = [] if decision.merge is None else decision.candidates[decision.merge.target].tolist()
        for column, token in enumerate(columns.tolist()):
            if token >= 0 and token not in merged:
                assert torch.equal(entered[first][row, column], dense[row, int(table.position[token])])


# -- drawings --------------------------------------------------------------------------------------------------------
def test_each_picture_is_drawn_with_its_own_tokens():
    trace = trace_of([ImageInfo((2, 2)), ImageInfo((2, 2))], [0, 5, 6, 7])
    a, b = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))

    def counts(figure):
        return [t.get_text() for ax in figure.axes for t in ax.texts if "kept" in t.get_text()]

    assert counts(trace.plot(b, picture=1)) == ["3 of 4 kept"]
    assert counts(trace.plot(a, picture=0)) == ["1 of 4 kept"]
    assert counts(trace.plot([a, b])) == counts(trace.plot()) == ["1 of 4 kept", "3 of 4 kept"]
    for wrong in (b, [a], [a, b, a]):
        with pytest.raises(DataError, match="the row has 2 pictures"):
            trace.plot(wrong)
    with pytest.raises(DataError, match="no number 2"):
        trace.plot(a, picture=2)
