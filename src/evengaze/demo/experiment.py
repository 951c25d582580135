"""The demo's experiment: the same questions to the dense model and to every pruned one, on the real engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from evengaze.calibration.calibrate import to_curve
from evengaze.calibration.fit import fit_curve
from evengaze.calibration.observe import Observations, Sample, observe
from evengaze.debias import Debias, PaddingMask
from evengaze.debias.curve import Curve, Origin
from evengaze.demo.dataset import DemoImage, DemoQuestion
from evengaze.demo.model import dtype_of
from evengaze.evaluate.predictor import Predictor
from evengaze.evaluate.spec import DEMO, ModelSpec
from evengaze.layout import VisualLayout
from evengaze.methods import get
from evengaze.methods.base import Pruner
from evengaze.methods.baselines import Random, Uniform
from evengaze.methods.fastv import FastV
from evengaze.models.border import MEAN_COLOUR, padding_share

if TYPE_CHECKING:
    from evengaze.trace import Trace

Name = TypeVar("Name")

LAYER = 2
"""Tokens leave before this layer, as in FastV's paper."""

EARLY = 1
"""One budget is also asked a layer earlier, where this model's ranking is less biased."""

KEEPS = (0.25, 0.125, 0.06)
DEBIAS = {"none": "plain", "trend": "+ trend", "padding": "+ padding", "both": "both"}
"""The debias steps that are tried, and what they are called in tables."""

BASELINES = (Random.name, Uniform.name)
EXAMPLES = 6
BATCH = 32
LONGEST = 4
"""Tokens of an answer; all answers are one word."""

ORIGIN = Origin(model="evengaze demo", data="calibration set of the embedded model")


@dataclass(frozen=True)
class Trial:
    """One setting.

    Attributes:
        keep: share of the visual tokens that goes on.
        debias: "none", "trend", "padding" or "both".
        baseline: "random" or "uniform" in place of FastV, or None.
        layer: first layer that runs without the other tokens.
    """

    keep: float
    debias: str = "none"
    baseline: str | None = None
    layer: int = LAYER

    @property
    def method(self) -> str:
        """Name of the pruning method."""
        return self.baseline or FastV.name

    @property
    def label(self) -> str:
        """For tables: what tells the settings of one budget apart."""
        return self.baseline or DEBIAS[self.debias]

    def pruner(self, curve: Curve) -> Pruner:
        """The method with its debiasing."""
        debias = debias_steps(self.debias, curve, self.layer - 1)
        return get(self.method)(keep=self.keep, layer=self.layer, debias=debias)  # type: ignore[call-arg]


def debias_steps(name: str, curve: Curve, layer: int) -> Debias | None:
    """What one of `DEBIAS` stands for, with the curve's trend at the layer that ranks."""
    if name == "none":
        return None
    return Debias(
        padding=PaddingMask() if name in ("padding", "both") else None,
        trend=curve.at_layer(layer) if name in ("trend", "both") else None,
    )


@dataclass
class Answers:
    """Answers of one setting.

    Attributes:
        answers: by `question_id`.
        average_tokens: visual tokens that enter a layer, averaged over layers; one entry a question.
        seconds: time in `generate`, vision tower left out.
    """

    answers: dict[int, str] = field(default_factory=dict)
    average_tokens: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, more: Answers) -> None:
        """Take in the answers to further questions."""
        self.answers.update(more.answers)
        self.average_tokens += more.average_tokens
        self.seconds += more.seconds

    def credits(self, questions: Sequence[DemoQuestion]) -> dict[str, float]:
        """1 for a right answer, 0 for a wrong one, by question."""
        return {str(q.question_id): float(self.answers[q.question_id] == q.answer) for q in questions}

    def accuracy(self, questions: Sequence[DemoQuestion]) -> float:
        """Share of right answers."""
        return sum(self.credits(questions).values()) / len(questions)


@dataclass(frozen=True)
class Example:
    """One question whose traces are kept for the figure.

    Attributes:
        picture: the picture.
        question: the question.
        plain: of the plain ranking.
        both: with both debias steps.
        row: of the traces.
    """

    picture: DemoImage
    question: DemoQuestion
    plain: Trace
    both: Trace
    row: int


@dataclass(frozen=True)
class Calibration:
    """What the model's attention looks like before anything is removed.

    Attributes:
        curve: the trend at the ranking layer.
        bias: one entry a layer: sigma and r2 of the exponential summary, Spearman correlation, shares of kept tokens.
        samples: pictures looked at.
        seconds: how long it took.
    """

    curve: Curve
    bias: list[dict[str, float]]
    samples: int
    seconds: float


@dataclass(frozen=True)
class Experiment:
    """The whole experiment.

    Attributes:
        questions: what was asked.
        dense: the unpruned model's answers.
        cells: the settings and their answers, in the order of `settings`.
        calibration: where the trend is from.
        examples: what the figure shows.
        dtype: what the model computes in.
    """

    questions: list[DemoQuestion]
    dense: Answers
    cells: list[tuple[Trial, Answers]]
    calibration: Calibration
    examples: list[Example]
    dtype: str = "float32"

    def outcome(self, keep: float, label: str, layer: int = LAYER) -> Answers:
        """The outcome of the setting with that budget, label and layer."""
        return next(o for c, o in self.cells if (c.keep, c.label, c.layer) == (keep, label, layer))


def settings() -> list[Trial]:
    """All cells: every budget plain, with each step, with both, and the two baselines; one budget a layer earlier."""
    budgets = [(keep, LAYER, tuple(DEBIAS)) for keep in KEEPS] + [(KEEPS[1], EARLY, ("none", "both"))]
    return [
        cell
        for keep, layer, steps in budgets
        for cell in (
            *(Trial(keep, d, layer=layer) for d in steps),
            *(Trial(keep, baseline=b, layer=layer) for b in BASELINES),
        )
    ]


def calibration_samples(pictures: Sequence[DemoImage]) -> list[Sample]:
    """One question a picture."""
    return [Sample(p.image, p.questions[0].prompt) for p in pictures]


def calibrate(model: Any, processor: Any, pictures: Sequence[DemoImage]) -> Calibration:
    """Fit the trend at the ranking layer and measure all layers' bias, in one pass over one question a picture."""
    start = perf_counter()
    samples = calibration_samples(pictures)
    keep = KEEPS[1]
    found = observe(model, processor, samples, FastV(keep=keep, layer=LAYER), layers="all", batch_size=BATCH)
    ranking = {layer: found.layers[layer] for layer in (EARLY - 1, LAYER - 1)}
    curve = to_curve(replace(found, layers=ranking), LAYER - 1, origin=ORIGIN)
    bias = [_bias(found, layer) for layer in found.layers]
    return Calibration(curve, bias, len(samples), perf_counter() - start)


def _bias(found: Observations, layer: int) -> dict[str, float]:
    summary = fit_curve(found.stats(layer).profile(), family="exponential", bootstraps=2).summary
    measures = {name: m.value for name, m in found.measures(layer).items()}
    return {"layer": layer, "sigma": summary["sigma"], "r2": summary["r2"], **measures}


@dataclass(frozen=True)
class Batch:
    """A batch that is ready for the decoder: what enters it, and where its visual tokens are.

    Attributes:
        questions: one a row.
        embeds: (B, L, d) embeddings, features of pictures among them.
        mask: (B, L) attention mask; rows are padded on the left.
        layout: of the visual tokens.
    """

    questions: list[DemoQuestion]
    embeds: Tensor
    mask: Tensor
    layout: VisualLayout


@torch.inference_mode()
def encode(
    model: Any, processor: Any, pictures: Sequence[DemoImage], questions: Sequence[DemoQuestion]
) -> Iterator[Batch]:
    """Batches of questions about pictures; the vision tower sees each picture once.

    Questions of like length share a batch, so that hardly any padding is needed.
    """
    named = {q.image_index: p for p in pictures for q in p.questions}
    wanted = sorted({q.image_index for q in questions})
    features: dict[int, Tensor] = {}
    shares: dict[int, Tensor] = {}
    patch = model.config.vision_config.patch_size
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        pixels = processor.image_processor([named[i].image for i in part], return_tensors="pt")["pixel_values"]
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        seen = model.get_image_features(pixel_values=pixels.to(model.device, model.dtype))
        features.update(zip(part, getattr(seen, "pooler_output", seen), strict=True))
        shares.update(zip(part, padding_share(pixels, grid, MEAN_COLOUR).flatten(1), strict=True))

    tokenizer, image = processor.tokenizer, processor.image_token
    count = grid[0] * grid[1]
    texts = {q.question_id: q.prompt.replace(image, image * count) for q in questions}
    order = sorted(questions, key=lambda q: len(tokenizer(texts[q.question_id])["input_ids"]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        inputs = tokenizer(
            [texts[q.question_id] for q in batch], return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        ids = inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        first = (ids == model.config.image_token_id).int().argmax(1).tolist()
        for row, (question, at) in enumerate(zip(batch, first, strict=True)):
            embeds[row, at : at + count] = features[question.image_index].to(embeds)
        layout = VisualLayout.from_spans(
            [(at, at + count) for at in first], grid, padding=[shares[q.image_index] for q in batch]
        )
        yield Batch(batch, embeds, inputs["attention_mask"], layout)


def run(
    model: Any,
    processor: Any,
    pictures: Sequence[DemoImage],
    calibration: Calibration,
    *,
    limit: int | None = 200,
    advance: Callable[[int], None] = lambda answered: None,
) -> Experiment:
    """Ask everything.

    Args:
        model: the embedded model.
        processor: its processor.
        pictures: the evaluation set.
        calibration: gives the trend; from other pictures.
        limit: ask the first so many questions; None asks all.
        advance: told how many answers have come in.
    """
    questions = [q for p in pictures for q in p.questions][:limit]
    dense = Answers()
    cells = [(cell, Answers()) for cell in settings()]
    outcomes: dict[Trial | None, Answers] = {None: dense, **dict(cells)}
    pruners = {cell: get("dense")() if cell is None else cell.pruner(calibration.curve) for cell in outcomes}
    wanted = {p.questions[0].question_id: p for p in pictures[:EXAMPLES] if p.questions[0] in questions}
    traces: dict[tuple[int, str], tuple[Trace, int]] = {}
    for cell, batch, outcome, trace in ask(model, processor, pictures, questions, pruners):
        outcomes[cell].add(outcome)
        advance(len(batch))
        if cell is not None and (cell.keep, cell.layer) == (KEEPS[1], LAYER) and cell.label in ("plain", "both"):
            for row, question in enumerate(batch):
                if question.question_id in wanted:
                    traces[question.question_id, cell.label] = (trace, row)
    examples = [
        Example(picture, picture.questions[0], traces[number, "plain"][0], *traces[number, "both"])
        for number, picture in wanted.items()
    ]
    return Experiment(questions, dense, cells, calibration, examples, dtype_of(model))


def ask(
    model: Any,
    processor: Any,
    pictures: Sequence[DemoImage],
    questions: Sequence[DemoQuestion],
    pruners: Mapping[Name, Pruner],
    *,
    skip: Callable[[Name, Sequence[DemoQuestion]], bool] = lambda name, batch: False,
) -> Iterator[tuple[Name, list[DemoQuestion], Answers, Trace]]:
    """Ask batches of questions, each of all methods in turn.

    Args:
        model: the embedded model.
        processor: its processor.
        pictures: what is asked about.
        questions: about them.
        pruners: the methods by name.
        skip: whether a method need not answer a batch.

    Yields:
        The method's name, the batch, the answers to it and the trace, one after the other.
    """
    predictor = Predictor(model, processor, ModelSpec(DEMO))
    for batch in encode(model, processor, pictures, questions):
        inputs = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask}
        for name, pruner in pruners.items():
            if skip(name, batch.questions):
                continue
            start = perf_counter()
            attach = partial(pruner, layout=batch.layout)  # nobody sees pictures in embeddings
            texts, trace = predictor.complete(inputs, attach, max_new_tokens=LONGEST)
            seconds = perf_counter() - start
            assert trace is not None
            words = [" ".join(text.split()).lower() for text in texts]
            answers = dict(zip((q.question_id for q in batch.questions), words, strict=True))
            tokens = [trace.average_tokens(row) for row in range(len(texts))]
            yield name, batch.questions, Answers(answers, tokens, seconds), trace
