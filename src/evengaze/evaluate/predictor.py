"""A model that answers records: what the runner, the Ray actors and the lmms-eval plug-in all use."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evengaze.calibration.observe import image_digest
from evengaze.debias.curve import architecture_of
from evengaze.engine.session import Handle
from evengaze.errors import DataError, EvengazeError, out_of_memory
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.conversation import chat, render, resolve
from evengaze.evaluate.media import OFFICIAL_PICTURE, Media, read_media
from evengaze.evaluate.spec import ModelSpec as ModelSpec
from evengaze.evaluate.spec import open_spec
from evengaze.methods import Pruner, parse
from evengaze.models import adapter_for
from evengaze.schedule import DecoderShape
from evengaze.trace import Trace

CALIBRATED_ON = "calibrated_on"
"""Set in the trace of an answer about a picture that the debias curve was calibrated on."""
_ABOUT_MEDIA = re.compile(r"image|img|video|vision|audio|frame", re.IGNORECASE)
_TRIES = 8
"""Records that are tried for the number of visual tokens, if the model raises on the first ones."""


class OutOfMemory(EvengazeError, RuntimeError):
    """The batch does not fit; half of it may."""


@dataclass(frozen=True)
class Prediction:
    """What came out for one record.

    Attributes:
        record: the record.
        text: the answer, stripped; None if the record could not be read.
        trace: `visual_tokens` at the start, `average_tokens` over the layers, `relative_flops` of the prefill; empty
            for a text-only record. `calibrated_on` is there, and 1, if the debias curve was calibrated on the picture,
            `official_picture` if the official conversion shows it otherwise than viewers do.
        error: why there is no answer.
        raised: whether the model or its processor raised on this record, which could be read.
    """

    record: Record
    text: str | None
    trace: dict[str, float]
    error: str | None = None
    raised: bool = False


class Predictor:
    """A loaded model. Answers are greedy, and equal for equal batches.

    Attributes:
        spec: what was loaded.
        model: the model, in eval mode.
        processor: its processor; LLaVA-1.5's pads pictures to squares as LLaVA's own code does.
        missing: names of weights that are random numbers, as the checkpoint lacks them.
    """

    def __init__(self, model: Any, processor: Any, spec: ModelSpec, missing: Sequence[str] = ()) -> None:
        self.spec, self.model, self.processor, self.missing = spec, model.eval(), processor, tuple(missing)
        self.style = resolve(spec.prompt, processor, model.config.model_type)
        self._shape = DecoderShape.from_config(model.config)
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    @classmethod
    def load(cls, spec: ModelSpec) -> Predictor:
        """Load what a spec names.

        Raises:
            DataError: there is no such model, its files are broken or pickles, it lacks weights, or it needs code of
                its own.
            ConfigError: the device or dtype does not exist.
        """
        model, processor, missing = open_spec(spec)
        return cls(model, processor, spec, missing)

    # -- what a run depends on ------------------------------------------------------------------------------------
    def describe(self, template: str = "vicuna_v1") -> dict[str, Any]:
        """Everything about the model and its prompts that answers depend on, for the fingerprint."""
        return {
            "name": self.spec.name,
            "source": self.spec.source,
            "revision": self.revision,
            "missing_weights": list(self.missing),
            **({} if self.spec.adapter is None else {"adapter": self.spec.adapter, "adapter_files": self._adapter}),
            **({} if self.spec.quantize is None else {"quantized": self.spec.quantize}),
            "architecture": architecture_of(self.model.config),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "prompt": self.prompt(Record("", 0, "{question}", image=b""), template),
            "pictures": "as LLaVA's scripts convert them" if self.spec.official else "as viewers show them",
        }

    @cached_property
    def _adapter(self) -> str:
        """What tells an adapter's files from others, of a local folder; a hub id stands for itself."""
        folder = Path(self.spec.adapter or "")
        return digest_folder(folder) if folder.is_dir() else str(self.spec.adapter)

    @cached_property
    def revision(self) -> str:
        """The hub's commit, or a digest of a local folder's files, or the embedded weights' own."""
        commit = getattr(self.model.config, "_commit_hash", None)
        folder = Path(self.spec.source)
        if folder.is_dir():
            return digest_folder(folder)
        return str(commit or self.spec.revision or digest_weights(self.model))

    def prompt(self, record: Record, template: str) -> str:
        """The string that is tokenised for a record.

        Args:
            record: the record.
            template: the benchmark's conversation template; used if the model gets official prompts.
        """
        media = ["video"] if record.video is not None else [] if record.image is None else ["image"]
        return self.ask(record.prompt, media, template)

    def ask(self, question: str, media: Sequence[str], template: str) -> str:
        """The string that is tokenised for a question about some of "image" and "video"; `template` as in `prompt`.

        Raises:
            DataError: the question holds what the model takes for a picture.
        """
        self.refuse_markers(question)
        if self.style == "chat":
            return chat(self.processor, question, media)
        return render(template, question, "\n".join(f"<{kind}>" for kind in media))

    def refuse_markers(self, text: str) -> None:
        """Refuse a user's text that holds what the tokenizer turns into a picture; it cannot be escaped there.

        Raises:
            DataError: names it.
        """
        found = next((marker for marker in self._markers if marker in text), None)
        if found is not None:
            raise DataError(
                f"the question holds {found!r}, which this model takes for a picture or video of its own. Word it "
                f"otherwise, for instance with a space in {found!r}."
            )

    @cached_property
    def _markers(self) -> tuple[str, ...]:
        return media_markers(self.processor)

    def geometry(self, records: Sequence[Record], template: str = "vicuna_v1") -> tuple[int, int]:
        """Decoder layers, and the visual tokens of the first record that has a readable picture.

        Raises:
            DataError: no record has one, or the model fails on each.
        """
        dense = parse("dense")
        decoder: Any = adapter_for(self.model).decoder(self.model)
        layers = len(decoder.layers)
        raised: list[str] = []
        for record in records:
            if record.image is None and record.video is None:
                continue
            try:
                found = self.answer([record], dense, template=template, max_new_tokens=1)[0]
            except EvengazeError:
                raise
            except Exception as error:  # one odd record must not end the run; see `runner.answer_work`
                raised.append(f"{record.key}: {type(error).__name__}: {error}")
                if len(raised) == _TRIES:
                    break
                continue
            if found.trace:
                return layers, int(found.trace["visual_tokens"])
        if raised:
            raise DataError(
                f"the model failed on each of {len(raised)} records that were tried; the last, {raised[-1]}"
            )
        raise DataError("no record has a picture that can be read: there are no visual tokens to set a budget for")

    # -- answering ------------------------------------------------------------------------------------------------
    def answer(
        self, records: Sequence[Record], pruner: Pruner, *, template: str = "vicuna_v1", max_new_tokens: int = 128
    ) -> list[Prediction]:
        """Answer records in one batch (two if only some of them have a picture).

        A record whose picture cannot be read, or whose question cannot be asked, gets an error in place of an answer;
        the others are answered.
        """
        done: dict[int, Prediction] = {}
        curve = None if pruner.debiasing is None else pruner.debiasing.curve
        known = frozenset(() if curve is None else curve.images)
        groups: dict[str, list[tuple[int, Media, str]]] = {}
        for index, record in enumerate(records):
            try:
                media = read_media(record, official=self.spec.official)
                text = self.prompt(record, template)
            except DataError as error:
                done[index] = Prediction(record, None, {}, str(error))
            else:
                groups.setdefault(media.kind, []).append((index, media, text))
        for kind, members in groups.items():
            texts = [text for _, _, text in members]
            pictures = {} if kind == "text" else {kind: [media.content for _, media, _ in members]}
            answers = self.generate(texts, pictures, pruner, max_new_tokens=max_new_tokens)
            for (index, one, _), (text, trace) in zip(members, answers, strict=True):
                seen = bool(known) and kind != "text" and image_digest(one.content) in known
                marks = {CALIBRATED_ON: seen, OFFICIAL_PICTURE: one.differs and self.spec.official}
                set_marks = {mark: 1 for mark, is_set in marks.items() if is_set}
                done[index] = Prediction(records[index], text, {**trace, **set_marks})
        return [done[index] for index in range(len(records))]

    @torch.inference_mode()
    def generate(
        self, texts: Sequence[str], media: Mapping[str, Sequence[Any]], pruner: Pruner, **generation: Any
    ) -> list[tuple[str, dict[str, float]]]:
        """Continue prompts, greedily unless said otherwise.

        Args:
            texts: prompts with the model's image markers.
            media: "images" and "videos" as the processor takes them: one a prompt, or a list for each prompt.
            pruner: the method.
            generation: arguments of the model's `generate`.

        Returns:
            The new text, stripped, and what a `Prediction` says of the trace, for each prompt.

        Raises:
            OutOfMemory: memory ran out.
        """
        try:
            inputs = self.inputs(texts, media)
            answers, trace = self.complete(inputs, pruner, **generation)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemory(f"out of memory with {len(texts)} questions at a time ({error})") from error
        real = inputs["attention_mask"].sum(1).tolist()
        return [(answers[row], self.figures(trace, row, real[row])) for row in range(len(texts))]

    def inputs(self, texts: Sequence[str], media: Mapping[str, Sequence[Any]], *, multiple: int | None = None) -> Any:
        """What the model's `generate` takes, on its device, padded to a multiple of so many tokens; `texts` and `media`
        as in `generate`."""
        padded = {} if multiple is None else {"pad_to_multiple_of": multiple}
        return encode(self.processor, texts, media, **padded).to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def complete(
        self,
        inputs: Any,
        pruner: Callable[[Any], AbstractContextManager[Handle]],
        *,
        attached: Callable[[Handle], None] | None = None,
        **generation: Any,
    ) -> tuple[list[str], Trace | None]:
        """Continue `inputs`.

        Args:
            inputs: what `self.inputs` made, or `inputs_embeds` and `attention_mask`.
            pruner: the method, or whatever else attaches it to a model.
            attached: called with the method's handle before it starts, for those who look in between.
            generation: arguments of the model's `generate`.

        Returns:
            The new text, stripped, of each row, and the whole trace.
        """
        tokenizer = self.processor.tokenizer
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        with pruner(self.model) as run:
            if attached is not None:
                attached(run)
            output = self.model.generate(**inputs, **{**greedy, "pad_token_id": tokenizer.pad_token_id, **generation})
        prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # of embeddings only new tokens come back
        new = output[:, prompt:]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)], run.trace

    def figures(self, trace: Trace | None, row: int, tokens: int) -> dict[str, float]:
        """What a `Prediction` says of a trace's row of `tokens` tokens (batch padding left out)."""
        if trace is None or not len(trace.layout.rows[row]):
            return {}
        entering = trace.visual_tokens(row)
        text = tokens - entering[0]
        cost = sum(self._shape.layer_flops(n + text) for n in entering)
        return {
            "visual_tokens": entering[0],
            "average_tokens": round(trace.average_tokens(row), 4),
            "relative_flops": round(cost / (len(entering) * self._shape.layer_flops(tokens)), 6),
        }


def media_markers(processor: Any) -> tuple[str, ...]:
    """Strings that a processor, or LLaVA's templates, turn into pictures and videos."""
    tokenizer = processor.tokenizer
    named = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    special = [str(token) for token in getattr(tokenizer, "all_special_tokens", ())]
    found = ["<image>", "<video>", *(token for token in named if isinstance(token, str))]
    found += [token for token in (*added, *special) if _ABOUT_MEDIA.search(token)]
    return tuple(dict.fromkeys(token for token in found if token))


def encode(processor: Any, texts: Sequence[str], media: Mapping[str, Sequence[Any]], **options: Any) -> Any:
    """What a processor makes of prompts and their media, without a second token of beginning."""
    tokenizer = processor.tokenizer
    begins = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
    return processor(
        text=list(texts), return_tensors="pt", padding=True, add_special_tokens=not begins, **media, **options
    )


def digest_folder(folder: Path) -> str:
    """A digest that changes when a model's files do, without reading all of their bytes.

    Files of up to two megabytes, as configurations are, count in full; of larger ones the size and the first and last
    megabyte.
    """
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".bin", ".gguf", ".model", ".jinja", ".txt"):
            continue
        size = path.stat().st_size
        total.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as handle:
            total.update(handle.read(1 << 20))
            if size > 1 << 20:
                handle.seek(max(1 << 20, size - (1 << 20)))
                total.update(handle.read())
    return total.hexdigest()[:16]


def digest_weights(model: Any) -> str:
    """A digest of a model in memory, from the sum and the shape of each of its parameters."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(f"{name}\0{tuple(value.shape)}\0{float(value.double().sum()):.12e}".encode())
    return total.hexdigest()[:16]
