"""A tiny LLaVA in a folder, and small benchmarks in LLaVA's layout, for the tests of everything above the scorers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from evengaze.evaluate.predictor import Prediction
from evengaze.evaluate.runner import Work
from evengaze.testing import tiny
from evengaze.testing.prompts import BOS, IMAGE, PAD, VIDEO


def byte_tokenizer() -> Any:
    """One token a byte, with LLaVA's special tokens at the ids that the tiny models use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": 2}
    vocabulary |= {letter: 3 + i for i, letter in enumerate(alphabet)}
    vocabulary |= {f"<filler{i}>": i for i in range(len(vocabulary), IMAGE)} | {"<image>": IMAGE}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
    )


def save_model(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random LLaVA-1.5 with its processor, as a checkpoint's folder has them."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, _ = tiny("llava", seed=seed)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    LlavaProcessor(
        image_processor=images,
        tokenizer=byte_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def save_pope(root: Path, images: int = 4, seed: int = 0) -> Path:
    """Write a small POPE in LLaVA's layout: three questions an image, one of each category."""
    draw = random.Random(seed)
    folder = root / "playground/data/eval/pope"
    (folder / "val2014").mkdir(parents=True)
    (folder / "coco").mkdir()
    questions, labels = [], {}
    for c, category in enumerate(("adversarial", "random", "popular")):
        labels[category] = []
        for i in range(images):
            name = f"COCO_val2014_{i:012d}.jpg"
            text = f"Is there a {draw.choice(['dog', 'cat', 'car', 'tree'])} in the image?"
            questions.append(
                {
                    "question_id": 10_000_000 * c + i + 1,
                    "image": name,
                    "text": f"{text}\nAnswer the question using a single word or phrase.",
                    "category": category,
                }
            )
            label = draw.choice(["yes", "no"])
            labels[category].append({"question_id": i + 1, "image": name, "text": text, "label": label})
    for i in range(images):
        size = (40 + 10 * (i % 3), 60 - 10 * (i % 2))
        picture = Image.new("RGB", size)
        picture.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(size[0] * size[1])])
        picture.save(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg")
    write_lines(folder / "llava_pope_test.jsonl", questions)
    for category, rows in labels.items():
        write_lines(folder / "coco" / f"coco_pope_{category}.json", rows)
    return root


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_video(path: Path, shade: int = 0) -> None:
    """Write twelve grey frames, each lighter than the one before."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), (shade + 15 * i) % 256, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class VideoProcessor:
    """What Video-LLaVA's processor does; the real one needs torchvision."""

    chat_template = "USER: ASSISTANT:"

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<video>"]})

    def apply_chat_template(self, messages: object, **options: object) -> str:
        return self.chat_template

    def __call__(self, text: list[str], videos: list[np.ndarray], **options: object) -> BatchFeature:
        shape = videos[0].shape
        assert shape[0] == 8
        assert shape[3] == 3
        pixels = torch.stack([torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 255 for clip in videos])
        pixels = torch.nn.functional.interpolate(pixels.flatten(0, 1), (56, 56)).unflatten(0, (len(videos), 8))
        expanded = [t.replace("<video>", "<video>" * 136) for t in text]
        tokens = self.tokenizer(expanded, **options)
        tokens["input_ids"][tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids("<video>")] = VIDEO
        return BatchFeature({**tokens, "pixel_values_videos": pixels})


class EchoBackend:
    """Answers "Yes" to everything, without a model and without opening pictures."""

    def describe(self, template: str) -> dict[str, Any]:
        return {"name": "echo", "prompt": template}

    def geometry(self, records: Any, template: str) -> tuple[int, int]:
        return 32, 576

    def answer(self, works: Iterable[Work]) -> Iterator[tuple[int, list[Prediction]]]:
        for work in works:
            yield work.job, [Prediction(record, "Yes", {}) for record in work.batch]
