"""A loaded model that answers one question about given pictures; what `run`, `compare` and `profile` share."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

from transformers.utils.logging import disable_progress_bar

from evengaze.cli import output
from evengaze.debias import Debias
from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.media import open_media
from evengaze.evaluate.predictor import Predictor
from evengaze.evaluate.samples import ENDINGS, TEMPLATE
from evengaze.evaluate.spec import DEMO, ModelSpec, check_source
from evengaze.methods import parse
from evengaze.models import adapter_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from evengaze.methods import Pruner
    from evengaze.trace import Trace

FIGURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Answered:
    """What the model said, what was kept, and how long it took."""

    text: str
    trace: Trace | None
    seconds: float


class Session:
    """A model with its processor.

    Attributes:
        predictor: the loaded model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Load a model."""
        if not sys.stderr.isatty() or output.voice.quiet:
            disable_progress_bar()
        start = perf_counter()
        self.predictor = Predictor.load(spec)
        loaded: Any = self.predictor.model
        output.detail(
            f"{spec.source}: {type(loaded).__name__}, {loaded.dtype}, {loaded.device}, "
            f"{getattr(loaded.config, '_attn_implementation', '?')} attention, {perf_counter() - start:.1f} s to load"
        )

    @property
    def layers(self) -> int:
        """Decoder layers."""
        decoder: Any = adapter_for(self.predictor.model).decoder(self.predictor.model)
        return len(decoder.layers)

    def inputs(self, images: Sequence[Image], question: str) -> Any:
        """What `generate` takes, on the model's device."""
        text = self.predictor.ask(question, ["image"] * len(images), TEMPLATE)
        return self.predictor.inputs([text], {"images": list(images)} if images else {})

    def answer(self, images: Sequence[Image], question: str, pruner: Pruner, max_new_tokens: int = 64) -> Answered:
        """Answer a question greedily with a method attached."""
        inputs = self.inputs(images, question)
        start = perf_counter()
        (text,), trace = self.predictor.complete(inputs, pruner, max_new_tokens=max_new_tokens)
        return Answered(text, trace, perf_counter() - start)


def config_of(model: str, revision: str | None = None, *, flag: str = "--model", shapes: bool = False) -> Any:
    """The config of a model, without its weights.

    Args:
        model: hub id, folder, file or "demo".
        revision: on the hub.
        flag: the option that named it.
        shapes: whether the names of `evengaze.profile.shapes` will do.
    """
    from evengaze.demo.model import FOLDER
    from evengaze.models.loading import load_config
    from evengaze.profile.shapes import SHAPES, shape_of

    shape = shape_of(model) if shapes and not Path(model).exists() else None
    if shape is not None:
        return shape
    check_source(model, f"{flag} {model}", f"; shapes known by name are {', '.join(SHAPES)}" if shapes else "")
    return load_config(str(FOLDER) if model == DEMO else model, revision=revision, name=f"{flag} {model}")


def depth(spec: ModelSpec) -> int:
    """Decoder layers of a model by its config."""
    return int(config_of(spec.source, spec.revision).get_text_config().num_hidden_layers)


def check_stages(pruners: Sequence[Pruner], spec: ModelSpec) -> None:
    """Find out before anything is loaded whether methods fit a model's depth.

    Raises:
        ConfigError: a stage lies outside of it.
        DataError: there is no such model.
    """
    layers = depth(spec)
    for pruner in pruners:
        pruner.stages(layers)


def read_pictures(paths: Sequence[Path]) -> list[Image]:
    """RGB pictures; says which frame of an animation is seen.

    Raises:
        DataError: a file is missing or no picture.
    """
    for path in paths:
        if path.is_dir():
            first = next((p.name for p in sorted(path.iterdir()) if p.suffix.lower() in ENDINGS), "photo.jpg")
            raise DataError(
                f"--image {path} is a folder; give a picture in it, such as {path / first}, and repeat --image for "
                "several. Folders are for --images of calibrate and bias"
            )
        if not path.is_file():
            raise DataError(f"--image {path}: there is no such file")
    pictures = [open_media(Record(str(path), 0, "", image=path))[1] for path in paths]
    for path in paths:
        frames = _frames(path)
        if frames > 1:
            output.note(f"{path} is an animation of {frames} frames: the model sees the first one")
    return pictures


def _frames(path: Path) -> int:
    from PIL import Image as images

    with images.open(path) as opened:
        return int(getattr(opened, "n_frames", 1))


def note_on_demo(spec: ModelSpec) -> None:
    """Say what the embedded model knows, before it is asked about anything else."""
    if spec.source == DEMO:
        output.note(
            "The embedded model knows its own synthetic pictures (coloured shapes and digits) only: its answers about "
            "photographs mean nothing. --model takes any supported model; see `evengaze list models`."
        )


def method(text: str, debias: str | None = None) -> Pruner:
    """A method as the command line names it; "none" is the dense model.

    Args:
        text: what `evengaze.methods.parse` takes.
        debias: replaces the debiasing in `text`: what `Debias.parse` takes.
    """
    pruner = parse("dense" if text.strip() in ("none", "dense") else text)
    return pruner if debias is None else pruner.replace(debias=Debias.parse(debias))


def check_output(path: Path | None, *endings: str) -> None:
    """Find out before the work starts whether a file can be written, and say if that replaces one.

    Raises:
        ConfigError: it ends in nothing that can be written.
        DataError: its folder does not exist or cannot be written to, or it is a folder itself.
    """
    if path is None:
        return
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(f"{path}: give a file that ends in {' or '.join(endings)}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; make the folder first")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise DataError(f"{path} cannot be written: no permission")
    output.replaces(path)


def check_folder(path: Path) -> None:
    """Make a folder for results before the work starts, and say if that may replace some."""
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is a file; give a folder")
    path.mkdir(parents=True, exist_ok=True)
    output.replaces(path)


def layers_of(text: str | None) -> list[int] | Literal["all"] | None:
    """Layers, as `--layers` takes them.

    Raises:
        ConfigError: it names none.
    """
    if text is None or text == "all":
        return cast("Literal['all'] | None", text)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {text}: give 'all' or numbers such as 1,2,3") from None


def formats(text: str) -> tuple[str, ...]:
    """File formats of figures, as `--formats` takes them.

    Raises:
        ConfigError: figures cannot be written in one of them.
    """
    found = tuple(part.strip().lower().removeprefix(".") for part in text.split(",") if part.strip())
    wrong = [part for part in found if f".{part}" not in FIGURES]
    if wrong or not found:
        raise ConfigError(f"--formats {text}: give some of png, pdf and svg")
    return found


def sample_picture() -> Image:
    """A picture of the embedded evaluation set, for commands that were given none."""
    from PIL import Image as images

    from evengaze.demo.scenes import make_scene

    buffer = BytesIO()
    images.fromarray(make_scene(0, 0, 0).pixels).save(buffer, "PNG")
    return images.open(buffer)
