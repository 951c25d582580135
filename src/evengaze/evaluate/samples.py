"""Pictures and prompts for calibration, from a folder, a list or the embedded calibration set.

predictor = Predictor.load(ModelSpec("llava-hf/llava-1.5-7b-hf"))
source = Source.of("pictures/", model=predictor.spec.source)
curve = calibrate(predictor.model, predictor.processor, source.samples(predictor), method, encode=encode)
print(source.skipped)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evengaze.calibration.observe import Sample
from evengaze.errors import DataError
from evengaze.evaluate import predictor
from evengaze.evaluate.benchmarks import BENCHMARKS, Record
from evengaze.evaluate.jsonl import read_jsonl, require_clean
from evengaze.evaluate.media import open_media
from evengaze.evaluate.spec import DEMO
from evengaze.evaluate.video import EXTENSIONS
from evengaze.extras import require

if TYPE_CHECKING:
    from evengaze.evaluate.predictor import Predictor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PROMPT_KEYS = ("prompt", "question", "text")
TEMPLATE = "vicuna_v1"
"""Of models that are asked as LLaVA's scripts do; see `evengaze.evaluate.conversation`."""

PROMPTS = (
    "Describe this picture in one sentence.",
    "What is the main object, and where is it?",
    "How many objects can you see?",
    "What colors stand out?",
    "Is there any text in the picture? If so, what does it say?",
    "What is happening here?",
)
"""Asked in turn where the user gives no prompts: a trend should not be that of a single question."""


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        records: pictures (unread) with their questions.
        name: in words, for the curve's origin.
        skipped: of those that `samples` could not read, why, in words; filled while it goes.
    """

    records: tuple[Record, ...] = field(repr=False)
    name: str
    skipped: list[str] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def of(
        cls,
        images: str | Path | None,
        prompts: Sequence[str] = (),
        limit: int | None = None,
        *,
        model: str = "",
        split: str = "calibration",
        seed: int = 0,
    ) -> Source:
        """Read the list, not the pictures.

        Args:
            images: a folder of pictures (or of videos), or a JSON-lines file of {"image" or "video": path, "prompt",
                "question" or "text": text}, such as LLaVA's question files, with paths relative to it, to `images/`
                beside it or to a benchmark's own folder beside it. None: the embedded set, for the embedded model.
            prompts: asked in turn; a list's own prompts come first.
            limit: take so many, spread evenly.
            model: the model's name.
            split: of the embedded set, "calibration" or "eval".
            seed: other seeds give other pictures of the embedded set.

        Raises:
            DataError: nothing is there, it holds no pictures, or a list's pictures are nowhere.
            MissingExtraError: it holds videos, and what reads them is not installed.
        """
        images = None if images is None else Path(images)
        if images is None:
            records, name = _embedded(model, split, seed)
        elif images.is_dir():
            records = _folder(images, prompts or PROMPTS)
            name = f"{'videos' if records[0].video else 'pictures'} of {images.absolute().name}"
        elif images.suffix == ".jsonl":
            records, name = _list(images, prompts or PROMPTS), f"list {images.name}"
        else:
            what = "" if images.exists() else ", which does not exist"
            raise DataError(f"images {images}{what}: give a folder of pictures or videos, or a .jsonl file")
        if records[0].video is not None:
            require("video", "a video", "av")
        if limit is not None and limit < len(records):
            records = [records[i * len(records) // limit] for i in range(limit)]
        return cls(tuple(records), name)

    def samples(self, model: Predictor) -> Iterator[Sample]:
        """Read the pictures one by one, with the prompts as the model's template has them.

        What cannot be read is left out and noted in `skipped`.
        """
        self.skipped.clear()
        for record in self.records:
            try:
                _, media = open_media(record)
            except DataError as error:
                self.skipped.append(str(error))
                continue
            yield Sample(media, model.prompt(record, TEMPLATE))


def encode(processor: Any, batch: Sequence[Sample]) -> Mapping[str, Any]:
    """From samples, all pictures or all videos, to the model's inputs."""
    kind = "videos" if isinstance(batch[0].image, np.ndarray) else "images"
    made: Mapping[str, Any] = predictor.encode(processor, [s.prompt for s in batch], {kind: [s.image for s in batch]})
    return made


def _embedded(model: str, split: str, seed: int) -> tuple[list[Record], str]:
    if model != DEMO:
        raise DataError(
            "images: give a folder of pictures or a .jsonl file; a trend should be calibrated on pictures like those "
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
    for kind, endings in (("image", ENDINGS), ("video", EXTENSIONS)):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings)
        if files:
            return [_record(str(p), prompts[i % len(prompts)], kind, p) for i, p in enumerate(files)]
    raise DataError(f"{folder} holds no pictures ({', '.join(ENDINGS)}) and no videos ({', '.join(EXTENSIONS)})")


def _list(path: Path, prompts: Sequence[str]) -> list[Record]:
    records: list[Record] = []
    kinds = set()
    folders = _beside(path)
    for number, line in enumerate(require_clean(read_jsonl(path, ()))):
        prompt = next((line[k] for k in PROMPT_KEYS if k in line), prompts[number % len(prompts)])
        media = [k for k in ("image", "video") if line.get(k)]
        if not media and "image" in line and isinstance(prompt, str):
            continue  # a question without a picture, as LLaVA's files have them
        if len(media) != 1 or not isinstance(line[media[0]], str) or not isinstance(prompt, str):
            keys = ", ".join(map(repr, PROMPT_KEYS))
            raise DataError(f"{path}: record {number + 1} needs 'image' or 'video', and a text as one of {keys}")
        kinds.add(media[0])
        home = next((f for f in folders if (f / line[media[0]]).is_file()), None)
        if home is None:
            tried = ", ".join(str(f) for f in folders if f.is_dir() or f.name == "images")
            raise DataError(
                f"{path}: record {number + 1}: there is no {line[media[0]]} in {tried}. Give paths relative to the "
                "list, or put the files into a folder 'images' beside it."
            )
        folders.insert(0, folders.pop(folders.index(home)))  # where the others are, too, most likely
        records.append(_record(str(number), prompt, media[0], home / line[media[0]]))
    if not records:
        raise DataError(f"{path}: no record has a picture")
    if len(kinds) > 1:
        raise DataError(f"{path} lists pictures and videos: their trends differ, so make a list of each")
    return records


def _record(key: str, prompt: str, kind: str, path: Path) -> Record:
    record = Record(key, 0, prompt)
    return replace(record, image=path) if kind == "image" else replace(record, video=path)


def _beside(path: Path) -> list[Path]:
    """Where the files of a list may be: beside it, or where a benchmark's layout has them."""
    names = dict.fromkeys(f.path for b in BENCHMARKS.values() for f in b.files if f.kind == "dir")
    return [path.parent, path.parent / "images", *(path.parent / n for n in names if n != "images")]
