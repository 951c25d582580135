"""A loaded model that answers one question about given pictures; what `run`, `compare` and `profile` share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.logging import disable_progress_bar

from evengaze.debias import Debias
from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.conversation import render
from evengaze.evaluate.predictor import ModelSpec, Predictor, open_media
from evengaze.methods import parse
from evengaze.models import adapter_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from evengaze.methods import Pruner
    from evengaze.trace import Trace

_TEMPLATE = "vicuna_v1"


@dataclass(frozen=True)
class Answer:
    """What the model said, what was kept, and how long it took."""

    text: str
    trace: Trace | None
    seconds: float


class Session:
    """A model with its processor.

    Attributes:
        predictor: the loaded model.
    """

    def __init__(self, model: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto") -> None:
        if not sys.stderr.isatty():
            disable_progress_bar()
        self.predictor = Predictor.load(ModelSpec(model, revision=revision, dtype=dtype, device=device))

    @property
    def layers(self) -> int:
        """Decoder layers."""
        decoder: Any = adapter_for(self.predictor.model).decoder(self.predictor.model)
        return len(decoder.layers)

    def inputs(self, images: Sequence[Image], question: str) -> Any:
        """What `generate` takes, on the model's device."""
        processor = self.predictor.processor
        if self.predictor.style == "chat":
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            text = str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        else:
            text = render(_TEMPLATE, question, "\n".join("<image>" for _ in images))
        tokenizer = processor.tokenizer
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        options: dict[str, Any] = {"images": list(images)} if images else {}
        made = processor(text=[text], return_tensors="pt", add_special_tokens=not begins, **options)
        return made.to(self.predictor.model.device, self.predictor.model.dtype)

    @torch.inference_mode()
    def answer(self, images: Sequence[Image], question: str, pruner: Pruner, max_new_tokens: int = 64) -> Answer:
        """Answer a question greedily with a method attached."""
        model, tokenizer = self.predictor.model, self.predictor.processor.tokenizer
        inputs = self.inputs(images, question)
        start = perf_counter()
        with pruner(model) as run:
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        seconds = perf_counter() - start
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return Answer(text, run.trace, seconds)


def read_pictures(paths: Sequence[Path]) -> list[Image]:
    """RGB pictures.

    Raises:
        DataError: a file is missing or no picture.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"--image {path}: there is no such file")
    return [open_media(Record(str(path), 0, "", image=path))[1] for path in paths]


def method(text: str, debias: str | None = None) -> Pruner:
    """A method as the command line names it; "none" is the dense model.

    Args:
        text: what `evengaze.methods.parse` takes.
        debias: replaces the debiasing in `text`: what `Debias.parse` takes.
    """
    pruner = parse("dense" if text.strip() in ("none", "dense") else text)
    return pruner if debias is None else pruner.replace(debias=Debias.parse(debias))


def output(path: Path | None, *endings: str) -> None:
    """Find out before the work starts whether a file can be written.

    Raises:
        ConfigError: its folder does not exist, or it ends in nothing that can be written.
    """
    if path is None:
        return
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(f"{path}: give a file that ends in {' or '.join(endings)}")
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path.absolute().parent} does not exist; make the folder first")


def sample_picture() -> Image:
    """A picture of the embedded evaluation set, for commands that were given none."""
    from PIL import Image as images

    from evengaze.demo.scenes import make_scene

    buffer = BytesIO()
    images.fromarray(make_scene(0, 0, 0).pixels).save(buffer, "PNG")
    return images.open(buffer)
