"""A model for lmms-eval 0.7 (extra `evengaze[lmms-eval]`), found through its entry-point group.

    lmms_eval --model evengaze --tasks pope \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=fastv,keep=128,layer=2,debias=llava-1.5-7b/fastv

Tasks that compare likelihoods (output types multiple_choice and loglikelihood) need `--force_simple`: lmms-eval hands
chat models tasks of generation only.

Everything that changes answers travels in `--model_args`, because lmms-eval keeps answers in a cache under that
string. A curve file's content is not part of it: give a changed curve another name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from tqdm import tqdm

from evengaze.errors import ConfigError
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.conversation import Style, render
from evengaze.evaluate.likelihood import likelihood
from evengaze.evaluate.media import as_rgb, open_media
from evengaze.evaluate.predictor import Predictor
from evengaze.evaluate.runner import rank_and_world
from evengaze.evaluate.spec import ModelSpec
from evengaze.methods import Pruner, parse

_PASSED_ON = ("max_new_tokens", "num_beams", "temperature", "top_p", "top_k", "do_sample")


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    here = "evengaze.evaluate.lmms_eval"
    return ModelManifest("evengaze", simple_class_path=f"{here}.EvengazeSimple", chat_class_path=f"{here}.Evengaze")


def pruner_of(method: str, parameters: dict[str, Any]) -> Pruner:
    """The method from the values that lmms-eval has read from its argument string.

    Raises:
        ConfigError: an unknown method or parameter.
    """
    if method in ("none", "dense"):
        if set(parameters) - {"debias"}:
            raise ConfigError(f"--model_args: {', '.join(parameters)} without a method; add method=fastv, for instance")
        return parse("dense")
    given = {key: value for key, value in parameters.items() if (key, value) != ("debias", "none")}
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    return parse(f"{method}:{','.join(words)}" if words else method)


class Evengaze(lmms):  # type: ignore[misc]
    """Any supported model with any pruning method, batched."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str = "none",
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        prompt: Style = "auto",
        allow_missing: bool = False,
        **parameters: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: hub id, local folder, or "demo".
            method: name of the pruning method; "none" is the dense model.
            revision: on the hub.
            dtype: of the weights.
            device: None takes an accelerator if there is one.
            attn_implementation: None takes transformers' default.
            batch_size: prompts a generate call.
            max_batch_size: not used; lmms-eval passes it.
            prompt: "auto", "official" (LLaVA's template) or "chat" (the model's own).
            allow_missing: load a checkpoint that lacks weights, with random numbers in their place.
            parameters: the method's, such as `keep` and `layer`, and `debias`: "none", "padding", a preset's
                name or a curve file.

        Raises:
            ConfigError: an unknown method or parameter.
            DataError: the model cannot be loaded.
        """
        super().__init__()
        self.pruner = pruner_of(method, parameters)
        self.batch_size = int(batch_size)
        spec = ModelSpec(pretrained, revision, dtype, device or "auto", attn_implementation, prompt, allow_missing)
        self.predictor = Predictor.load(spec)
        self._rank, self._world_size = rank_and_world()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer requests in their order; an error ends the run instead of becoming an empty answer."""
        answers: dict[int, str] = {}
        kept: list[dict[str, float]] = []
        prepared = [self._prepare(request) for request in requests]
        groups: dict[str, list[int]] = {}
        for index, (_, images, videos, generation) in enumerate(prepared):
            # Only prompts with equally many pictures and equal settings share a batch.
            groups.setdefault(json.dumps([len(images), len(videos), generation], default=str), []).append(index)
        bar = tqdm(total=len(requests), disable=self._rank != 0, desc="evengaze")
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size]
                for index, (text, trace) in zip(chosen, self._answer([prepared[i] for i in chosen]), strict=True):
                    answers[index] = text
                    kept += [trace] if trace else []
                bar.update(len(chosen))
        bar.close()
        if kept:
            average = sum(trace["average_tokens"] for trace in kept) / len(kept)
            visual = sum(trace["visual_tokens"] for trace in kept) / len(kept)
            logger.info(f"{self.pruner.name}: {average:.2f} of {visual:.1f} visual tokens entered a layer on average")
        return [answers[index] for index in range(len(requests))]

    def _prepare(self, request: Instance) -> tuple[str, list[Any], list[Any], dict[str, Any]]:
        """Prompt, pictures, videos and generation settings of a request."""
        _, to_messages, generation, doc, task, split = request.args
        messages = to_messages(self.task_dict[task][split][doc])
        images: list[Any] = []
        videos: list[Any] = []
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(as_rgb(part["url"], official=self.predictor.spec.official))
                elif part["type"] == "video":
                    videos.append(open_media(Record("", 0, "", video=Path(part["url"])))[1])
                elif part["type"] != "text":
                    raise ConfigError(
                        f"task {task} has {part['type']} input; evengaze answers about pictures and videos"
                    )
        return self._text(messages), images, videos, dict(generation)

    def _text(self, messages: Sequence[dict[str, Any]]) -> str:
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text":
                    self.predictor.refuse_markers(part["text"])
        if self.predictor.style == "official" and len(messages) == 1:
            content = messages[0]["content"]
            words = "\n".join(part["text"] for part in content if part["type"] == "text")
            marks = "\n".join(f"<{part['type']}>" for part in content if part["type"] != "text")
            return render("vicuna_v1", words, marks)
        plain = [
            {
                "role": message["role"],
                "content": [
                    {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
                    for part in message["content"]
                ],
            }
            for message in messages
        ]
        return str(self.predictor.processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False))

    def _answer(
        self, prepared: Sequence[tuple[str, list[Any], list[Any], dict[str, Any]]]
    ) -> list[tuple[str, dict[str, float]]]:
        media: dict[str, list[Any]] = {}
        columns = {"images": [entry[1] for entry in prepared], "videos": [entry[2] for entry in prepared]}
        for name, found in columns.items():
            if found[0]:
                media[name] = [row[0] for row in found] if len(found[0]) == 1 else found
        asked = prepared[0][3]
        generation = {key: asked[key] for key in _PASSED_ON if key in asked}
        generation.setdefault("max_new_tokens", 1024)
        if not generation.get("temperature"):  # tasks ask for temperature 0, which transformers calls no sampling
            generation |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            generation["do_sample"] = True
        stops = asked.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        texts = [entry[0] for entry in prepared]
        answers = self.predictor.generate(texts, media, self.pruner, **generation)
        return [(_cut(text, stops), trace) for text, trace in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Offered by `EvengazeSimple`: lmms-eval asks chat models for nothing but generation."""
        raise NotImplementedError("tasks that compare likelihoods need --force_simple")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("evengaze answers single-round tasks only (output_type: generate_until)")


class EvengazeSimple(Evengaze):
    """The same for lmms-eval's older kind of tasks, with `--force_simple`: likelihoods, and generation."""

    is_simple = True

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each request the answer's loss, and whether greedy decoding gives it.

        lmms-eval calls it a log-likelihood, and takes the option with the smallest one: its own models return the mean
        negative log-probability of the answer's tokens, and so does this. Pairs are wrapped, as lmms-eval 0.7 makes
        text of bare ones, which its metrics cannot read.
        """
        found = []
        for request in tqdm(requests, disable=self._rank != 0, desc="evengaze"):
            context, target, *where = request.args
            images: list[Any] = []
            if where:  # options without their context (mutual information) have no picture either
                to_visual, doc, task, split = where
                record = self.task_dict[task][split][doc]
                target = target(record) if callable(target) else target
                images = [self._picture(picture, task) for picture in to_visual(record) or ()]
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": context}]
            prompt = self._text([{"role": "user", "content": content}])
            media = {"images": [images[0] if len(images) == 1 else images]} if images else {}
            said = likelihood(self.predictor, prompt, str(target), media, self.pruner)
            found.append(GenerationResult((said.loss, said.greedy)))
        return found

    def _prepare(self, request: Instance) -> tuple[str, list[Any], list[Any], dict[str, Any]]:
        context, generation, to_visual, doc, task, split = request.args
        images = [self._picture(picture, task) for picture in to_visual(self.task_dict[task][split][doc]) or ()]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": context}]
        return self._text([{"role": "user", "content": content}]), images, [], dict(generation)

    def _picture(self, picture: Any, task: str) -> Any:
        if not hasattr(picture, "convert"):
            raise ConfigError(f"task {task} has other input than pictures; run it without --force_simple")
        return as_rgb(picture, official=self.predictor.spec.official)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)].strip() if ends else text
