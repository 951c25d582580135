"""A loaded model that answers one question about given pictures; what `run`, `compare` and `profile` share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from transformers.utils.logging import disable_progress_bar

from evengaze.debias import Debias
from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.predictor import ModelSpec, Predictor, open_media
from evengaze.methods import parse
from evengaze.models import adapter_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from evengaze.methods import Pruner
    from evengaze.trace import Trace

TEMPLATE = "vicuna_v1"


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

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        allow_missing: bool = False,
    ) -> None:
        if not sys.stderr.isatty():
            disable_progress_bar()
        spec = ModelSpec(model, revision=revision, dtype=dtype, device=device, allow_missing=allow_missing)
        self.predictor = Predictor.load(spec)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        decoder: Any = adapter_for(self.predictor.model).decoder(self.predictor.model)
        return len(decoder.layers)

    def inputs(self, images: Sequence[Image], question: str) -> Any:
        """What `generate` takes, on the model's device."""
        text = self.predictor.ask(question, ["image"] * len(images), TEMPLATE)
        return self.predictor.inputs([text], {"images": list(images)} if images else {})

    def answer(self, images: Sequence[Image], question: str, pruner: Pruner, max_new_tokens: int = 64) -> Answer:
        """Answer a question greedily with a method attached."""
        inputs = self.inputs(images, question)
        start = perf_counter()
        (text,), trace = self.predictor.complete(inputs, pruner, max_new_tokens=max_new_tokens)
        return Answer(text, trace, perf_counter() - start)


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
