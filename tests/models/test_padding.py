"""Padding from what each family's image processor really does, on pictures whose padded patches are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from evengaze.errors import LayoutError
from evengaze.layout import VisualTokens, square_padding
from evengaze.models import Call, adapter_for, llava_processor
from evengaze.models.border import black, padding_share
from evengaze.models.llava_next import tiled
from evengaze.testing import tiny
from evengaze.testing.prompts import IMAGE
from models.helpers import encode

CLIP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def padded(pictures: list[Image.Image], **changes: Any) -> Tensor:
    values: Tensor = LlavaImageProcessorPil(**CLIP, do_pad=True, **changes)(pictures, return_tensors="pt")[
        "pixel_values"
    ]
    return values


def row_of(family: str, inputs: dict[str, Tensor]) -> tuple[VisualTokens, Any]:
    """The table of one prompt with as many placeholders as the model makes features."""
    model, _ = tiny(family)
    calls, features = encode(model, inputs)
    ids = torch.tensor([[1, *[IMAGE] * len(features["image"]), 7]])
    found = adapter_for(model).layout(model, Call(ids, None, 0, calls))
    assert found is not None
    return found.rows[0], model


# -- the rule ---------------------------------------------------------------------------------------------------------
def test_square_of_a_wide_picture() -> None:
    """640 x 360 fills 13.5 of 24 rows: 10 rows are padding, 2 partly."""
    share = padding_share(padded([picture(640, 360)]), (24, 24))[0]
    full, partial = share == 1, (share > 0) & (share < 1)
    assert int(full.sum()) == 240
    assert int(partial.sum()) == 48
    assert full[:5].all()
    assert full[-5:].all()
    assert partial[[5, 18]].all()


@pytest.mark.parametrize("size", [(640, 360), (360, 640), (500, 499), (800, 200), (336, 336), (350, 970)])
def test_close_to_the_geometry(size: tuple[int, int]) -> None:
    """Resizing blends the edge over two pixels at most; a patch has 14."""
    share = padding_share(padded([picture(*size)]), (24, 24))[0]
    assert (share - square_padding(size, (24, 24))).abs().max() <= 2 / 14


def test_pictures_of_a_batch_do_not_influence_each_other() -> None:
    pixels = padded([picture(640, 360), picture(300, 500), picture(64, 64)])
    together = padding_share(pixels, (24, 24))
    for k in range(3):
        assert torch.equal(together[k], padding_share(pixels[k : k + 1], (24, 24))[0])
    assert (together[2] == 0).all()


def test_white_margins_are_content() -> None:
    page = picture(336, 336)
    page.paste((255, 255, 255), (0, 0, 336, 120))
    assert (padding_share(padded([page]), (24, 24)) == 0).all()


def test_mean_coloured_patches_inside_are_content() -> None:
    image = picture(336, 336)
    image.paste((122, 116, 104), (100, 100, 200, 200))
    assert (padding_share(padded([image]), (24, 24)) == 0).all()


def test_black_padding_is_found_by_its_own_colour_only() -> None:
    image = picture(336, 336)
    image.paste((0, 0, 0), (0, 0, 336, 140))
    processor = LlavaImageProcessorPil(**CLIP)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert (padding_share(pixels, (24, 24)) == 0).all()
    share = padding_share(pixels, (24, 24), black(processor.image_mean, processor.image_std))[0]
    assert (share[:10] == 1).all()
    assert (share[10:] == 0).all()


def test_blank_picture_has_no_padding() -> None:
    assert (padding_share(torch.zeros(1, 3, 56, 56), (4, 4)) == 0).all()


def test_half_precision() -> None:
    pixels = padded([picture(640, 360)])
    assert torch.equal(padding_share(pixels, (24, 24)), padding_share(pixels.bfloat16(), (24, 24)))


# -- llava_processor --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", [CLIPImageProcessorPil, LlavaImageProcessorPil])
def test_llava_processor_pads(cls: Any) -> None:
    mean = [0.4, 0.5, 0.6]
    processor = llava_processor(SimpleNamespace(image_processor=cls(**CLIP, image_mean=mean)))
    pixels = processor.image_processor(picture(640, 360), return_tensors="pt")["pixel_values"]
    assert list(processor.image_processor.image_mean) == mean
    assert int((padding_share(pixels, (24, 24)) == 1).sum()) == 240


def test_llava_processor_from_a_folder(tmp_path: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<image>": 1, "what": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    saved = LlavaProcessor(
        CLIPImageProcessorPil(**CLIP),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    saved.save_pretrained(tmp_path)
    processor = llava_processor(tmp_path)
    inputs = processor(images=picture(640, 360), text="<image> what", return_tensors="pt")
    assert int((inputs["input_ids"] == 1).sum()) == 576
    assert int((padding_share(inputs["pixel_values"], (24, 24)) == 1).sum()) == 240


def test_llava_processor_of_another_family() -> None:
    with pytest.raises(LayoutError, match="no CLIP-like"):
        llava_processor(SimpleNamespace(image_processor=SimpleNamespace()))


# -- families ---------------------------------------------------------------------------------------------------------
def test_llava() -> None:
    small = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = LlavaImageProcessorPil(**small, do_pad=True)
    pixels = processor([picture(200, 100), picture(100, 100)], return_tensors="pt")["pixel_values"]
    row, _ = row_of("llava", {"pixel_values": pixels})
    assert (row.padding[:4] > 0.8).all()
    assert (row.padding[12:16] > 0.8).all()
    assert (row.padding[4:12] == 0).all()
    assert (row.padding[16:] == 0).all()


@pytest.mark.parametrize("size", [(500, 300), (300, 500), (333, 334), (1000, 260), (64, 250)])
@pytest.mark.parametrize(
    ("family", "cls"),
    [
        ("llava_next", "LlavaNextImageProcessorPil"),
        ("llava_next_video", "LlavaNextImageProcessorPil"),
        ("llava_onevision", "LlavaOnevisionImageProcessorPil"),
    ],
)
def test_anyres(family: str, cls: str, size: tuple[int, int]) -> None:
    """A white picture on the black canvas: what is not white in the tiles is padding."""
    points = [[56, 112], [112, 56], [112, 112]]
    processor = getattr(transformers, cls)(
        size={"height": 56, "width": 56} if "onevision" in family else {"shortest_edge": 56},
        image_grid_pinpoints=points,
        do_normalize=False,
        **({} if "onevision" in family else {"crop_size": {"height": 56, "width": 56}}),
    )
    white = Image.new("RGB", size, (255, 255, 255))
    inputs = processor(white, return_tensors="pt")
    row, _ = row_of(family, {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]})
    base, detail = row.take(row.image == 0), row.take(row.image == 1)
    assert (base.padding == 0).all()  # the thumbnail is squashed
    rows, columns = row.images[1].grid
    tiles = inputs["pixel_values"][0, 1:]
    height, width = transformers.image_processing_utils.select_best_resolution((size[1], size[0]), points)
    tiles = tiles[: height * width // 56**2].unflatten(0, (height // 56, width // 56))
    canvas = torch.cat([torch.cat(list(line), 2) for line in tiles], 1)[0]
    share = 1 - torch.nn.functional.avg_pool2d(canvas[None], 14)[0]
    top, left = (share.shape[0] - rows) // 2, (share.shape[1] - columns) // 2
    expected = share[top : top + rows, left : left + columns].flatten().double()
    torch.testing.assert_close(detail.padding, expected, atol=1e-5, rtol=0)
    assert detail.padding.max() < 1  # rows and columns of nothing but padding are gone


@pytest.mark.parametrize("size", [(111, 1000), (1000, 111)])
def test_anyres_without_any_detail_left(size: tuple[int, int]) -> None:
    """`unpad_image` rounds a very long picture down to no row, or to rows of nothing but a newline."""
    inputs = {"pixel_values": torch.randn(1, 3, 3, 56, 56), "image_sizes": torch.tensor([size])}
    row, _ = row_of("llava_next", inputs)
    assert [i.grid for i in row.images] == [(4, 4)]
    assert len(row) == 16


@pytest.mark.parametrize("family", ["LlavaNext", "LlavaOnevision"])
def test_anyres_counts_of_the_released_shapes(family: str) -> None:
    """As many placeholders as the family's processor writes, for pictures of any size."""
    config = getattr(transformers, f"{family}Config")()
    cls = getattr(transformers, f"{family}Processor")
    processor = cls.__new__(cls)  # what counts placeholders needs no tokenizer
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    side, most = (336, None) if family == "LlavaNext" else (384, 9)
    processor.patch_size, processor.num_image_tokens, processor.vision_aspect_ratio = 14, 27**2, "anyres_max_9"
    processor.num_additional_image_tokens = 0
    generator = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(n) for n in generator.integers(28, 3000, 2))
        expected = processor._get_number_of_features(height, width, side, side)
        assert len(tiled(config, (height, width), most)) == expected, (height, width)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_tiles(family: str, split: bool) -> None:
    """Tiles are squashed; tiles of zeros fill up the shorter row of a batch and never become tokens."""
    cls = "Idefics3ImageProcessorPil" if family == "idefics3" else "SmolVLMImageProcessorPil"
    longest = {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 112}}
    processor = getattr(transformers, cls)(do_image_splitting=split, **longest)
    inputs = dict(processor([[picture(112, 42)], [picture(112, 100)]], return_tensors="pt"))
    inputs = {k: v for k, v in inputs.items() if k in ("pixel_values", "pixel_attention_mask")}
    model, _ = tiny(family)
    calls, features = encode(model, inputs)
    rows = []
    for tiles in [3, 5] if split else [1, 1]:
        rows.append([1, *[t for k in range(tiles - 1) for t in (20 + k, *[IMAGE] * 16)], 282, *[IMAGE] * 16])
    ids = torch.zeros(2, max(map(len, rows)), dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, -len(row) :] = torch.tensor(row)
    assert int((ids == IMAGE).sum()) == len(features["image"])
    found = adapter_for(model).layout(model, Call(ids, None, 0, calls))
    assert found is not None
    assert [[i.frames for i in r.images] for r in found.rows] == ([[3], [5]] if split else [[1], [1]])
    assert all((r.padding == 0).all() for r in found.rows)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_pixel_attention_mask(family: str) -> None:
    """A picture that fills 42 of 112 lines of its tile, as processors that do not squash make them."""
    mask = torch.ones(1, 2, 112, 112, dtype=torch.long)
    mask[0, 1, 42:] = 0
    inputs = {"pixel_values": torch.randn(1, 2, 3, 112, 112), "pixel_attention_mask": mask}
    model, _ = tiny(family)
    calls, _ = encode(model, inputs)
    ids = torch.tensor([[1, 282, *[IMAGE] * 16, 5, 282, *[IMAGE] * 16, 7]])
    found = adapter_for(model).layout(model, Call(ids, None, 0, calls))
    assert found is not None
    row = found.rows[0]
    assert [i.frames for i in row.images] == [1, 1]
    assert (row.padding[:16] == 0).all()
    expected = torch.tensor([0, 0.5, 1, 1], dtype=torch.float64).repeat_interleave(4)
    torch.testing.assert_close(row.padding[16:], expected)


@pytest.mark.parametrize(
    ("family", "cls", "options"),
    [
        ("internvl", "GotOcr2ImageProcessorPil", {"size": {"height": 112, "width": 112}, "crop_to_patches": False}),
        ("gemma3", "Gemma3ImageProcessorPil", {"size": {"height": 56, "width": 56}}),
        ("paligemma", "SiglipImageProcessorPil", {"size": {"height": 56, "width": 56}}),
        ("video_llava", "CLIPImageProcessorPil", {"size": {"shortest_edge": 56}, "crop_size": 56}),
        ("qwen2_vl", "Qwen2VLImageProcessorPil", {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 112 * 112}),
        ("qwen2_5_vl", "Qwen2VLImageProcessorPil", {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 112 * 112}),
        ("qwen3_vl", "Qwen2VLImageProcessorPil", {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 112 * 112}),
        ("mistral3", "PixtralImageProcessorPil", {"patch_size": 28, "size": {"longest_edge": 112}}),
    ],
)
def test_families_that_do_not_pad(family: str, cls: str, options: dict[str, Any]) -> None:
    """They squash, crop or keep the aspect ratio: a wide picture leaves no padding in the tokens."""
    processor = getattr(transformers, cls)(**options)
    inputs = dict(processor(picture(200, 100), return_tensors="pt"))
    inputs = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw", "image_sizes")}
    if family == "mistral3":
        inputs["image_sizes"] = torch.as_tensor(inputs["image_sizes"])
    row, _ = row_of(family, inputs)
    assert len(row) > 0
    assert (row.padding == 0).all()
    if family.startswith("qwen") or family == "mistral3":
        assert row.images[0].grid in ((2, 5), (2, 4))


def test_a_border_is_what_it_is_said_to_be() -> None:
    """Row by row and column by column, on pictures with borders on any side, with corners only, and of one colour."""
    chance = torch.Generator().manual_seed(0)
    pictures = torch.rand(60, 3, 12, 9, generator=chance) + 0.5
    for picture in pictures:
        top, bottom, left, right = torch.randint(0, 4, (4,), generator=chance).tolist()
        picture[:, :top], picture[:, 12 - bottom :], picture[..., :left], picture[..., 9 - right :] = 0, 0, 0, 0
    pictures[7], pictures[8, :, 0, 0], pictures[9, :, 5], pictures[10, 0, 0] = 0, 0, 0, 0
    shares = padding_share(pictures, (4, 3))
    for picture, share in zip(pictures, shares, strict=True):
        filled = picture.abs().amax(0) <= 0.03
        padded = torch.zeros(12, 9, dtype=torch.bool)
        for i in range(12):
            padded[i] |= filled[: i + 1].all() | filled[i:].all()
        for j in range(9):
            padded[:, j] |= filled[:, : j + 1].all() | filled[:, j:].all()
        expected = torch.zeros(12, 9) if filled.all() else padded.double()
        assert torch.equal(share, expected.double().reshape(4, 3, 3, 3).mean((1, 3)))
    apart = torch.stack([padding_share(picture[None], (4, 3))[0] for picture in pictures])
    assert torch.equal(apart, shares) and 0 < int((shares.sum((1, 2)) == 0).sum()) < 60
