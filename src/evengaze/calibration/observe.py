"""Running a model over pictures and collecting how a method ranks their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from evengaze.calibration.measures import Measure, padding_ratio, summarise
from evengaze.calibration.observer import Observer, Sink, first_layer, first_stage
from evengaze.calibration.stats import LayerStats
from evengaze.debias.beyond import Prior
from evengaze.debias.curve import architecture_of
from evengaze.debias.debias import Debias
from evengaze.errors import ConfigError, CurveError, DataError
from evengaze.files import read_json, write_whole
from evengaze.methods.base import Pruner
from evengaze.models import adapter_for
from evengaze.protocol import View, resolve_keep

STATE = 1


@dataclass(frozen=True)
class Sample:
    """A picture and a prompt.

    Attributes:
        image: a PIL image, or the frames of a video.
        prompt: the whole string that is tokenised, image placeholder and chat template included.
    """

    image: Any
    prompt: str

    @property
    def digest(self) -> str:
        """12 hex digits of the picture's pixels, whatever file format they came in."""
        return image_digest(self.image)


Encode = Callable[[Any, Sequence[Sample]], Mapping[str, Any]]
"""From a processor and a batch to the model's inputs."""


@dataclass(repr=False)
class Observations:
    """What was collected: a state that can be written after any batch and gone on from.

    Attributes:
        method: the method's parameters.
        architecture: of the model.
        target: "attention" or "frequency".
        layers: statistics by 0-based layer.
        digests: of the pictures that were seen, in order.
    """

    method: dict[str, Any]
    architecture: str
    target: str
    layers: dict[int, LayerStats] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"<Observations of {self.method.get('method', 'a method')}: {self.samples} samples; layers {layers}>"

    @property
    def samples(self) -> int:
        """Samples that were seen."""
        return len(self.digests)

    def stats(self, layer: int) -> LayerStats:
        """The statistics of a layer.

        Raises:
            CurveError: nothing was seen there.
        """
        if layer not in self.layers:
            raise CurveError(f"no sample with visual tokens was seen at layer {layer}; were there pictures at all?")
        return self.layers[layer]

    def measures(self, layer: int, *, after: bool = False) -> dict[str, Measure]:
        """The measures of bias at a layer, of the plain ranking or of the debiased one."""
        stats = self.stats(layer)
        found = summarise(stats.after if after else stats.before)
        scores = stats.debiased if after else stats
        if scores is not None:
            ratio = padding_ratio(scores.profile(), scores.profile(padding=True))
            if ratio is not None:
                found["padding_ratio"] = ratio
        return found

    def to_dict(self) -> dict[str, Any]:
        """The exact state as JSON-able values."""
        return {
            "evengaze_calibration": STATE,
            **{k: getattr(self, k) for k in ("method", "architecture", "target", "digests")},
            "layers": {str(k): v.to_dict() for k, v in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Observations:
        """The inverse of `to_dict`.

        Raises:
            CurveError: not a calibration state, or of another version.
        """
        if not isinstance(values, Mapping) or values.get("evengaze_calibration") != STATE:
            raise CurveError("not a calibration state of this version; delete it and start again")
        try:
            return cls(
                method=dict(values["method"]),
                architecture=str(values["architecture"]),
                target=str(values["target"]),
                layers={int(k): LayerStats.from_dict(v) for k, v in values["layers"].items()},
                digests=[str(d) for d in values["digests"]],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CurveError):
                raise
            raise CurveError(f"malformed calibration state ({error!r}); delete it and start again") from None

    def save(self, path: str | Path) -> None:
        """Write the state, so that `observe` can go on from it after a kill."""
        write_whole(Path(path), json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Observations:
        """Read a state that `save` wrote.

        Raises:
            CurveError: it cannot be read, or is of another version.
        """
        try:
            return cls.from_dict(read_json(Path(path), dict, "To start again, delete it."))
        except DataError as error:
            raise CurveError(str(error)) from None
        except CurveError as error:
            raise CurveError(f"{path}: {error}") from None


def observe(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    method: Pruner,
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    target: Literal["attention", "frequency"] = "attention",
    debias: Debias | Mapping[int, Debias] | None = None,
    batch_size: int = 4,
    encode: Encode | None = None,
    state: Observations | None = None,
    after_batch: Callable[[Observations], bool] | None = None,
) -> Observations:
    """Run a model over samples and collect what a method's ranking does at some layers.

    Nothing is pruned, and the model is left behind its last observed layer.

    Args:
        model: the model.
        processor: its processor.
        samples: pictures and prompts; read once, a batch at a time.
        method: the method whose scores are collected; its own debiasing is not applied.
        layers: 0-based layers whose attention is ranked by; the method's own first one if None.
        target: "attention" averages the scores, "frequency" how often the method would keep each token.
        debias: measure the ranking with this, too; one for all layers or one for each.
        batch_size: samples a forward call.
        encode: from the processor and a batch to the model's inputs; `processor(images, text)` if None.
        state: go on from here; the samples must be the same ones and start from the first.
        after_batch: called after each batch; return True to stop.

    Raises:
        ConfigError: the method ranks without text, a layer does not exist, or the state is of another run.
    """
    plain = method.replace(debias=None, mode="corrected")
    chosen = observed_layers(model, plain, layers)
    parameters = json.loads(json.dumps(plain.to_dict()))  # as a state that was written to a file has them
    what = {"method": parameters, "architecture": architecture_of(model.config), "target": target}
    if target not in ("attention", "frequency"):
        raise ConfigError(f"target must be 'attention' or 'frequency', not {target!r}")
    if state is None:
        state = Observations(**what)
    elif {k: getattr(state, k) for k in what} != what or (state.layers and tuple(state.layers) != chosen):
        raise ConfigError("the calibration state is of another model, method, target or layers; delete it")
    done = state

    def sink(number: int, view: View, score: Tensor) -> None:
        one = debias.get(chosen[number]) if isinstance(debias, Mapping) else debias
        stats = done.layers.setdefault(chosen[number], LayerStats(view.tokens.images[0][0].grid))
        budget = min(len(view), resolve_keep(plain.budget(0, len(view), view.original), view.original))
        stats.add(done.samples + view.rows[0], view.tokens.row(0), score, budget, target=target, debias=one)

    rest = iter(samples)
    for expected in done.digests:
        if next(rest, Sample(None, "")).digest != expected:
            raise ConfigError("the samples are not those that the calibration state was made from; delete it")
    with watching(model, plain, chosen, sink) as forward:
        for batch in _batches(rest, batch_size):
            forward((encode or encode_batch)(processor, batch))
            done.digests.extend(s.digest for s in batch)
            if after_batch is not None and after_batch(done):
                break
    return done


def observed_layers(
    model: nn.Module, method: Pruner, layers: Sequence[int] | Literal["all"] | None = None
) -> tuple[int, ...]:
    """The 0-based layers whose attention a method can rank by: its own first one, all, or those that are asked for.

    Raises:
        ConfigError: the method ranks without text, or a layer does not exist.
    """
    decoder: Any = adapter_for(model).decoder(model)
    return rankable(method, len(decoder.layers), layers)


def rankable(method: Pruner, depth: int, layers: Sequence[int] | Literal["all"] | None = None) -> tuple[int, ...]:
    """`observed_layers` of a decoder of `depth` layers, which need not be there yet."""
    first = first_stage(method, depth)
    if layers is None:
        return (first_layer(method, depth),)
    last = depth - (first.attention == "previous")
    chosen = tuple(range(last)) if layers == "all" else tuple(sorted({int(k) for k in layers}))
    if not chosen or chosen[0] < 0 or chosen[-1] >= last:
        raise ConfigError(f"layers={layers!r}: the attention of layers 0 to {last - 1} can be ranked by")
    return chosen


@contextmanager
def watching(
    model: nn.Module, method: Pruner, layers: tuple[int, ...], sink: Sink
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Attach an `Observer`; yields a function that runs the model on inputs up to the last observed layer."""
    decoder: Any = adapter_for(model).decoder(model)
    first = first_stage(method, len(decoder.layers))
    last = decoder.layers[layers[-1] + (first.attention == "previous")]
    with Observer(inner=method, layers=layers, sink=sink)(model):
        leave = last.register_forward_pre_hook(_leave)  # behind the observer's hook on the same layer
        try:
            yield lambda inputs: _forward(model, inputs)
        finally:
            leave.remove()


def priors(model: nn.Module, inputs: Mapping[str, Any], method: Pruner, *, strength: float = 1.0) -> list[Prior]:
    """What a method's scores are without a question: a prior for each row of a batch.

    Args:
        model: the model.
        inputs: the same pictures as in the call that is to be pruned, with a content-free text (an empty question), or
            content-free pictures (for a prior by cell).
        method: the method that will prune.
        strength: see `Prior`.

    Raises:
        ConfigError: the method does not rank by attention from text.
    """
    found: dict[int, Prior] = {}
    plain = method.replace(debias=None, mode="corrected")

    def sink(number: int, view: View, score: Tensor) -> None:
        found[view.rows[0]] = Prior.of(score.detach().float().cpu(), strength)

    with watching(model, plain, observed_layers(model, plain), sink) as forward:
        forward(inputs)
    return [found[row] for row in sorted(found)]


def image_digest(image: Any) -> str:
    """12 hex digits of a picture's pixels, or of several frames' together; PIL images and their arrays are equal."""
    digest = hashlib.sha256()
    several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
    for frame in image if several else [image]:
        pixels = np.ascontiguousarray(frame.convert("RGB") if hasattr(frame, "convert") else frame)
        digest.update(f"{pixels.shape[1::-1]}".encode())  # width and height
        digest.update(pixels.tobytes())
    return digest.hexdigest()[:12]


class _LeaveError(Exception):
    """Leaves a forward call whose rest is of no interest."""


def _leave(module: nn.Module, args: Any) -> None:
    raise _LeaveError


def _forward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    some = next(model.parameters())
    placed = {
        k: v.to(some.device, some.dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    with torch.inference_mode(), suppress(_LeaveError):
        model(**placed, use_cache=False)


def encode_batch(processor: Any, batch: Sequence[Sample]) -> Mapping[str, Any]:
    """The processor's own way, padded on the left so that all prompts end together."""
    tokenizer: Any = getattr(processor, "tokenizer", None)
    side = getattr(tokenizer, "padding_side", None)
    if side is not None:
        tokenizer.padding_side = "left"
    try:
        encoded: Mapping[str, Any] = processor(
            images=[s.image for s in batch], text=[s.prompt for s in batch], padding=True, return_tensors="pt"
        )
    except ValueError as error:
        raise DataError(
            f"the processor refuses a sample: {error} The prompt of a Sample is the whole text, image placeholder and "
            "chat template included, such as processor.apply_chat_template gives"
        ) from error
    finally:
        if side is not None:
            tokenizer.padding_side = side
    return encoded


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(samples, max(1, size))):
        yield batch
