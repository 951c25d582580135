from __future__ import annotations

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from evengaze.testing import tiny
from evengaze.testing.prompts import IMAGE, PAD


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random LLaVA with a processor, as a local folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llava"
    model, inputs = tiny("llava")
    side = inputs["pixel_values"].shape[-1]
    words = ["what", "is", "this", "?", "USER:", "ASSISTANT:", "A", "\n"]
    vocabulary = {word: 5 + i for i, word in enumerate(words)} | {"<pad>": PAD, "<unk>": 2, "<image>": IMAGE}
    vocabulary |= {f"w{i}": i for i in range(20, 280)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}
    )
    size = {"height": side, "width": side}
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.png"
    Image.linear_gradient("L").resize((60, 30)).convert("RGB").save(path)
    return path
