"""Pictures and prompts for calibration, from a folder, a list or the embedded calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evengaze.debias.observe import Sample
from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.files import read_jsonl, require_clean
from evengaze.evaluate.predictor import DEMO, open_media

if TYPE_CHECKING:
    from evengaze.evaluate.predictor import Predictor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

PROMPTS = (
    "Describe this picture in one sentence.",
    "What is the main object, and where is it?",
    "How many objects can you see?",
    "What colors stand out?",
    "Is there any text in the picture? If so, what does it say?",
    "What is happening here?",
)
"""Asked in turn where the user gives no prompts: a trend should not be that of a single question."""

_TEMPLATE = "vicuna_v1"


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        records: pictures (unread) with their questions.
        name: in words, for the curve's origin.
    """

    records: tuple[Record, ...]
    name: str

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def of(
        cls, images: Path | None, prompts: Sequence[str], limit: int | None, *, model: str, split: str, seed: int = 0
    ) -> Source:
        """Read the list, not the pictures.

        Args:
            images: a folder of pictures, or a JSON-lines file of {"image" or "video": path, "prompt": text} with paths
                relative to it. None: the embedded set, for the embedded model only.
            prompts: asked in turn; a list's own prompts come first.
            limit: take so many, spread evenly.
            model: the model's name.
            split: of the embedded set, "calibration" or "eval".
            seed: other seeds give other pictures of the embedded set.

        Raises:
            DataError: nothing is there, or it holds no pictures.
        """
        if images is None:
            records, name = _embedded(model, split, seed)
        elif images.is_dir():
            records, name = _folder(images, prompts or PROMPTS), f"pictures of {images.name}"
        elif images.suffix == ".jsonl":
            records, name = _list(images, prompts or PROMPTS), f"list {images.name}"
        else:
            raise DataError(f"{images}: give a folder of pictures or a .jsonl file")
        if limit is not None and limit < len(records):
            records = [records[i * len(records) // limit] for i in range(limit)]
        return cls(tuple(records), name)

    def samples(self, predictor: Predictor) -> Iterator[Sample]:
        """Read the pictures one by one, with the prompts as the model's template has them."""
        for record in self.records:
            _, media = open_media(record)
            yield Sample(media, predictor.prompt(record, _TEMPLATE))


def encoder(predictor: Predictor) -> Callable[[Any, Sequence[Sample]], Mapping[str, Any]]:
    """From samples to the model's inputs, pictures or videos."""

    def encode(processor: Any, batch: Sequence[Sample]) -> Mapping[str, Any]:
        tokenizer = processor.tokenizer
        begins = tokenizer.bos_token is not None and batch[0].prompt.startswith(tokenizer.bos_token)
        kind = "videos" if isinstance(batch[0].image, np.ndarray) else "images"
        options: dict[str, Any] = {kind: [s.image for s in batch], "add_special_tokens": not begins}
        made: Mapping[str, Any] = processor(
            text=[s.prompt for s in batch], padding=True, return_tensors="pt", **options
        )
        return made

    return encode


def _embedded(model: str, split: str, seed: int) -> tuple[list[Record], str]:
    if model != DEMO:
        raise DataError(
            "--images: give a folder of pictures or a .jsonl file; a trend should be calibrated on pictures like those "
            "that the model will see"
        )
    from io import BytesIO

    from evengaze.demo.dataset import make_dataset

    records = []
    for one in make_dataset(split, seed=seed):
        buffer = BytesIO()
        one.image.save(buffer, "PNG")
        records += [Record(str(q.question_id), 0, q.text, image=buffer.getvalue()) for q in one.questions]
    return records, f"embedded {split} set, seed {seed}"


def _folder(folder: Path, prompts: Sequence[str]) -> list[Record]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
    if not files:
        raise DataError(f"{folder} holds no pictures ({', '.join(ENDINGS)})")
    return [Record(str(p), 0, prompts[i % len(prompts)], image=p) for i, p in enumerate(files)]


def _list(path: Path, prompts: Sequence[str]) -> list[Record]:
    records = []
    for number, line in enumerate(require_clean(read_jsonl(path, ()))):
        prompt = line.get("prompt", line.get("question", prompts[number % len(prompts)]))
        media = {k: path.parent / str(line[k]) for k in ("image", "video") if k in line}
        if len(media) != 1 or not isinstance(prompt, str):
            raise DataError(f"{path}: record {number + 1} needs 'image' or 'video', and a text as 'prompt'")
        records.append(Record(str(number), 0, prompt, **media))  # type: ignore[arg-type]
    return records
