"""Where every family's visual tokens are: rows, pictures, views, frames, cells."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from evengaze.errors import LayoutError
from evengaze.layout import ImageInfo
from evengaze.methods import get
from evengaze.models import Call, adapter_for
from evengaze.models.pictures import Panel, Picture
from evengaze.testing import families, tiny
from evengaze.testing.matrix import greedy
from evengaze.testing.prompts import IMAGE, VIDEO
from models.helpers import encode, layout

FAMILIES = [f for f in families() if f != "llama"]
VIDEOS = families(video=True)

# Grid, frames and candidates of a row's first picture in `tiny`, and how many of its placeholders are no candidates.
IMAGES = {
    "llava": ([(4, 4)], 1, 0),
    "video_llava": ([(4, 4)], 1, 0),
    "llava_next": ([(4, 4), (4, 8)], 1, 4),
    "llava_next_video": ([(4, 4), (4, 8)], 1, 4),
    "llava_onevision": ([(4, 4), (4, 8)], 1, 4),
    "granite4_vision": ([(4, 4), (4, 8)], 1, 4),
    "qwen2_vl": ([(4, 4)], 1, 0),
    "qwen2_5_vl": ([(4, 4)], 1, 0),
    "qwen3_vl": ([(4, 4)], 1, 0),
    "internvl": ([(4, 4)], 2, 0),
    "idefics3": ([(4, 4)], 2, 0),
    "smolvlm": ([(4, 4)], 2, 0),
    "aya_vision": ([(4, 4)], 2, 0),
    "gemma3": ([(4, 4)], 1, 0),
    "paligemma": ([(4, 4)], 1, 0),
    "mistral3": ([(4, 4)], 1, 0),
}
CLIPS = {
    "video_llava": ((4, 4), 8, 8),
    "llava_next_video": ((2, 2), 8, 0),
    "llava_onevision": ((2, 2), 8, 1),
    "qwen2_vl": ((4, 4), 2, 0),
    "qwen2_5_vl": ((4, 4), 2, 0),
    "qwen3_vl": ((4, 4), 2, 0),
}


def test_every_family_is_covered() -> None:
    assert set(IMAGES) == set(FAMILIES)
    assert set(CLIPS) == set(VIDEOS)


@pytest.mark.parametrize("family", FAMILIES)
def test_image(family: str) -> None:
    model, inputs = tiny(family)
    found = layout(model, inputs)
    assert found is not None
    (row,) = found.rows
    grids, frames, others = IMAGES[family]
    assert [i.grid for i in row.images] == grids
    assert {i.frames for i in row.images} == {frames}
    placeholders = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    assert len(row) == len(placeholders) - others
    assert set(row.position.tolist()) <= set(placeholders.tolist())
    # Every cell of every grid and frame appears once, in order; x runs evenly through the picture.
    cells = [(k, f, c) for k, i in enumerate(row.images) for f in range(i.frames) for c in range(i.cells)]
    assert list(zip(row.image.tolist(), row.frame.tolist(), row.cell.tolist(), strict=True)) == cells
    torch.testing.assert_close(row.x, torch.arange(len(row), dtype=torch.float64) / len(row))
    assert (row.padding == 0).all()


@pytest.mark.parametrize("family", VIDEOS)
def test_video(family: str) -> None:
    model, inputs = tiny(family, video=True)
    found = layout(model, inputs)
    assert found is not None
    (row,) = found.rows
    grid, frames, others = CLIPS[family]
    (info,) = row.images
    assert (info.grid, info.frames) == (grid, frames)
    placeholders = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0]
    assert len(row) == len(placeholders) - others
    assert row.cell.tolist() == list(range(info.cells)) * frames
    assert row.frame.tolist() == [f for f in range(frames) for _ in range(info.cells)]
    torch.testing.assert_close(row.x, row.cell.double() / info.cells)  # x starts again in every frame


def test_class_token_of_each_frame_is_no_candidate() -> None:
    model, inputs = tiny("video_llava", video=True)
    found = layout(model, inputs)
    assert found is not None
    start = int((inputs["input_ids"][0] == VIDEO).nonzero()[0])
    class_tokens = {start + 17 * k for k in range(8)}
    assert not class_tokens & set(found.rows[0].position.tolist())


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newline_behind_each_row_is_no_candidate(family: str) -> None:
    model, inputs = tiny(family)
    found = layout(model, inputs)
    assert found is not None
    start = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    newlines = {start + 16 + 9 * k + 8 for k in range(4)}
    assert not newlines & set(found.rows[0].position.tolist())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch(family: str, side: str) -> None:
    """Two pictures, a row of text only, one picture; every row's table is that of the row alone, shifted."""
    counts = [2, 0, 1]
    model, inputs = tiny(family, 3, images=counts, side=side)
    found = layout(model, inputs)
    assert found is not None
    assert [len(r) for r in found.rows][1] == 0
    views = len(IMAGES[family][0])
    assert [len(r.images) for r in found.rows] == [2 * views, 0, views]
    ids = inputs["input_ids"]
    for b, row in enumerate(found.rows):
        assert set(row.position.tolist()) <= set((ids[b] == IMAGE).nonzero()[:, 0].tolist())
        assert inputs["attention_mask"][b, row.position].all()
        assert (row.position.diff() > 0).all()
        assert ((row.x >= 0) & (row.x < 1)).all()
        for k in range(len(row.images)):
            mine = row.image == k
            assert int(mine.sum()) == row.images[k].cells * row.images[k].frames


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_repeat_rows(family: str) -> None:
    model, inputs = tiny(family, 2, images=[2, 1])
    once, thrice = layout(model, inputs), layout(model, inputs, repeat=3)
    assert once is not None
    assert thrice is not None
    assert len(thrice) == 6
    for b, row in enumerate(thrice.rows):
        single = once.rows[b // 3]
        for name in ("position", "image", "frame", "cell", "x", "padding"):
            assert torch.equal(getattr(row, name), getattr(single, name))


@pytest.mark.parametrize("family", VIDEOS)
def test_image_and_video_in_one_prompt(family: str) -> None:
    model, image = tiny(family)
    _, video = tiny(family, video=True)
    both = {**image, **video}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in image:
            both[name] = torch.cat([video[name], image[name]], 1)
    calls, _ = encode(model, both)  # Qwen3-VL encodes a video through its function for images, which is seen as well
    found = adapter_for(model).layout(model, Call(both["input_ids"], None, 0, calls))
    assert found is not None
    (row,) = found.rows
    assert row.images[0].frames == CLIPS[family][1]
    assert [i.grid for i in row.images[1:]] == IMAGES[family][0]
    assert (row.position.diff() > 0).all()
    assert (row.image.diff() >= 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only(family: str) -> None:
    model, inputs = tiny(family, 2, images=0)
    assert layout(model, inputs) is None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "idefics3"])
def test_placeholders_without_pictures(family: str) -> None:
    model, inputs = tiny(family)
    with pytest.raises(LayoutError, match="Attach the pruner before the images are encoded"):
        adapter_for(model).layout(model, Call(inputs["input_ids"], None, 0, []))


def test_cut_off_placeholders() -> None:
    model, inputs = tiny("llava", 2)
    calls, _ = encode(model, inputs)
    ids = inputs["input_ids"].clone()
    there = (ids == IMAGE).nonzero()
    ids[tuple(there[0])] = 7  # one token of the first picture is missing, the second row has one too many
    ids[1, -1] = IMAGE
    with pytest.raises(LayoutError, match="no whole number of pictures"):
        adapter_for(model).layout(model, Call(ids, None, 0, calls))


def test_embeddings_in_place_of_ids() -> None:
    model, inputs = tiny("llava")
    calls, _ = encode(model, inputs)
    with pytest.raises(LayoutError, match="inputs_embeds"):
        adapter_for(model).layout(model, Call(None, None, 0, calls))
    assert adapter_for(model).layout(model, Call(None, None, 0, [])) is None


def test_onevision_shows_several_images_small() -> None:
    """With `batch_num_images`, pictures that share a prompt have no detail view."""
    model, inputs = tiny("llava_onevision", images=2)
    ids = inputs["input_ids"][0].tolist()
    small = [t for t in ids if t != IMAGE]
    small[4:4] = [IMAGE] * 17
    small[23:23] = [IMAGE] * 17
    inputs = {**inputs, "input_ids": torch.tensor([small]), "batch_num_images": torch.tensor([2])}
    calls, features = encode(model, inputs)
    assert len(features["image"]) == 34
    found = adapter_for(model).layout(model, Call(inputs["input_ids"], None, 0, calls))
    assert found is not None
    assert [i.grid for i in found.rows[0].images] == [(4, 4), (4, 4)]
    assert len(found.rows[0]) == 32


def test_onevision_shrinks_large_pictures() -> None:
    model, _ = tiny("llava_onevision")
    model.config.image_grid_pinpoints = [[224, 224]]
    sizes = torch.tensor([[200, 224]])
    inputs = {"pixel_values": torch.randn(1, 17, 3, 56, 56), "image_sizes": sizes}
    calls, features = encode(model, inputs)
    ids = torch.tensor([[1] + [IMAGE] * len(features["image"]) + [5]])
    found = adapter_for(model).layout(model, Call(ids, None, 0, calls))
    assert found is not None
    detail = found.rows[0].images[1].grid
    assert detail[0] * (detail[1] + 1) + 16 == len(features["image"])
    assert detail < (14, 16)


@pytest.mark.parametrize("family", ["granite4_vision", "qwen3_vl"])
def test_a_copy_of_an_attached_model_has_nothing_of_deepstack(family: str) -> None:
    model, inputs = tiny(family)
    _, dense = greedy(model, inputs, 2)
    with get("fastv")(keep=5, layer=2)(model):
        greedy(model, inputs, 2)
        other = copy.deepcopy(model)
    for found in (model, other):
        assert torch.equal(greedy(found, inputs, 2)[1], dense)


@pytest.mark.parametrize("special", [0, 1])
@pytest.mark.parametrize("video", [False, True])
def test_grids_that_are_remembered_are_those_that_are_made(video: bool, special: int) -> None:
    """Also for training, where what inference mode made cannot be used, and whatever the default device is."""
    info, share = ImageInfo((3, 5), frames=2), torch.rand(2, 3, 5, dtype=torch.float64)
    with torch.inference_mode(), torch.device("meta"):
        Picture.still(Panel.plain(info, special=special)), Picture.video(Panel.plain(info, special=special))
    plain = Panel.plain(info, share, special=special)
    made = Panel(info, plain.cell, share)
    found, expected = [(Picture.video if video else Picture.still)(panel) for panel in (plain, made)]
    for name in ("image", "frame", "cell", "x", "padding"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert not getattr(found, name).is_inference()
    assert found.images == (info,) and found.whole == expected.whole == (special == 0)


@pytest.mark.parametrize("special", [0, 1])
@pytest.mark.parametrize("count", [29, 31])
def test_padding_that_is_not_of_the_grids_is_an_error(count: int, special: int) -> None:
    panel = Panel.plain(ImageInfo((3, 5), frames=2), torch.rand(count), special=special)
    for kind in (Picture.still, Picture.video):
        with pytest.raises(RuntimeError, match="shape mismatch"):
            kind(panel)


def test_a_panel_whose_cells_were_replaced_shows_those() -> None:
    panel = Panel.plain(ImageInfo((3, 5)))
    assert Picture.still(dataclasses.replace(panel, cell=panel.cell.flip(0))).cell.tolist() == list(range(15))[::-1]


def test_what_is_written_into_the_layout_of_a_trace_is_not_in_the_next() -> None:
    model, inputs = tiny("llava")
    with torch.inference_mode(), get("fastv")(keep=4)(model) as run:
        model(**inputs)
        rows = run.trace.layout.rows
        before = [row.to_dict() for row in rows]
        assert any(len(row.images) == 1 for row in rows)
        for row in rows:
            row.x.fill_(0.5), row.cell.fill_(1), row.frame.fill_(1), row.padding.fill_(0.9)
        model(**inputs)
        assert [row.to_dict() for row in run.trace.layout.rows] == before
