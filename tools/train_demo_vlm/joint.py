"""Stages 3 and 4: the projector learns to speak the word embeddings' language, then everything is tuned together."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from evengaze.demo.scenes import COLORS, GRID, KINDS, POSITIONS, Question, Scene, ask

from . import data, language, vision

TOKENS = GRID**2
QUESTIONS = {"color": 3, "shape": 3, "digit": 2, "exists": 3, "count": 1, "position": 2}  # at most, per image
WEIGHTS = {"color": 1.0, "shape": 1.0, "digit": 1.2, "exists": 1.0, "count": 1.0, "position": 1.5}
END_WEIGHT = 0.2  # the end-of-answer token is learnt in no time
BACKGROUND_WEIGHT = 0.15
KEPT_TOKENS = 72  # visual tokens fed in the first part of the tuning, for speed
KEPT_THING = 0.85  # probability that a patch that shows something is among them
FIRST_PART = 0.75
FROZEN_LAYERS = 2  # these and the word embeddings stay as they were pretrained
LESS_ATTENDED = 8.0  # background gets this many times less of their attention than things at the same height


def make_model(work: Path, seed: int) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """A LLaVA from the trained tower, a fresh projector and the truncated language model."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    text = torch.load(work / "language.pt", weights_only=True)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision.CONFIG},
        text_config={"model_type": "llama", **text["config"]},
        image_token_index=tokenizer.convert_tokens_to_ids(language.IMAGE_TOKEN),
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    tower = torch.load(work / "vision.pt", weights_only=True)["model"]
    model.model.vision_tower.load_state_dict({k[2:]: v for k, v in tower.items() if k.startswith("0.")})
    model.model.language_model.load_state_dict(text["weights"])
    model.tie_weights()
    vision.speed_up(model.model.vision_tower)
    model.model.language_model.set_attn_implementation("eager")  # its backward pass is the faster one on a CPU
    return model, tokenizer


class Alignment:
    """What a patch's projection should resemble: the word embeddings of what it shows.

    A patch that shows a thing should look like the words for its colour and kind and, at half weight, for where the
    thing is. Words of one family resemble each other, so what they have in common is added once, and what sets each
    apart in full. Background should look, at a low weight, like one vector. Padding is left alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, words: torch.Tensor, background: torch.Tensor | None = None):
        """Align.

        Args:
            tokenizer: of the language model.
            words: its embedding matrix.
            background: what background should look like; default: faintly like any word for a thing.
        """
        kinds, colors, positions = (
            words[[tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in family]].detach()
            for family in (KINDS, COLORS, POSITIONS)
        )
        self.scale = words.detach().var()
        self.common = torch.cat([kinds, colors]).mean(0)
        self.kinds, self.colors, self.positions = (some - some.mean(0) for some in (kinds, colors, positions))
        self.background = self.common / 2 if background is None else background

    def targets(self, labels: data.Labels) -> torch.Tensor:
        """For the patches on things, in order, the vector to resemble."""
        shown = labels.on_thing
        position = labels.position[shown]
        where = 0.5 * (position >= 0)[:, None] * self.positions[position.clamp(min=0)]
        return self.common + self.kinds[labels.kind[shown] - 1] + self.colors[labels.color[shown] - 1] + where

    def loss(self, projected: torch.Tensor, labels: data.Labels) -> torch.Tensor:
        on_thing = (projected[labels.on_thing] - self.targets(labels)).square().mean()
        background = (projected[labels.kind == data.BACKGROUND] - self.background).square().mean()
        return (on_thing + BACKGROUND_WEIGHT * background) / self.scale


def questions_of(scene: Scene, *seed: int) -> list[Question]:
    """Some of the scene's questions, of every type."""
    chosen: list[Question] = []
    for question in ask(scene, *seed):
        if sum(other.type == question.type for other in chosen) < QUESTIONS[question.type]:
            chosen.append(question)
    return chosen


def keep_some(labels: data.Labels, count: int, random: np.random.RandomState) -> torch.Tensor:
    """Indices of the visual tokens to feed, ascending, shape (batch, count)."""
    shown = labels.on_thing.numpy()
    priority = random.random_sample(shown.shape) + (shown & (random.random_sample(shown.shape) < KEPT_THING))
    return torch.from_numpy(np.sort(np.argsort(-priority, axis=1)[:, :count], axis=1))


def difficulty(progress: float) -> tuple[int, int, int]:
    """How hard the scenes are at a share of the steps: with one thing there is nothing to confuse.

    Args:
        progress: the share of the steps done.

    Returns:
        The largest number of things, how many visual tokens to feed and how many images make a batch.
    """
    most = 1 + sum(progress >= threshold for threshold in (0.12, 0.20, 0.28, 0.36, 0.44))
    kept = KEPT_TOKENS - 8 * (6 - most) if progress < FIRST_PART else TOKENS
    return most, kept, (24, 16, 12, 10, 8, 8)[most - 1]


class Packer:
    """Packs many questions behind one image so that none sees another, each at its own true position."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.prefix = self.encode(language.PREFIX)
        self.pad = tokenizer.pad_token_id

    def __call__(self, batch: list[list[Question]], kept: torch.Tensor) -> dict[str, Any]:
        """Pack.

        Args:
            batch: the questions of each image.
            kept: ascending raster indices of the visual tokens that are fed, shape (images, n).

        Returns:
            input_ids of the text (images, s) with the visual tokens' places padded, position_ids (images, s), mask
            (images, 1, s, s), the length of the prefix, and for every supervised token rows, columns (of the state that
            predicts it), targets and weights.
        """
        head = len(self.prefix) + kept.shape[1]
        first = len(self.prefix) + TOKENS
        rows = []
        for questions in batch:
            ids, positions, segments, supervised = [], [], [], []
            for number, question in enumerate(questions, start=1):
                asked, answer = (
                    self.encode(language.prompt(question.text)),
                    self.encode(f" {question.answer}<|im_end|>"),
                )
                start = head + len(ids) + len(asked) - 1
                weight = WEIGHTS[question.type]
                supervised += [(start, answer[0], weight), (start + 1, answer[1], weight * END_WEIGHT)]
                segment = asked + answer[:-1]
                ids += segment
                positions += range(first, first + len(segment))
                segments += [number] * len(segment)
            rows.append((ids, positions, segments, supervised))
        length = head + max(len(row[0]) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad)
        input_ids[:, : len(self.prefix)] = torch.tensor(self.prefix)
        position_ids = torch.zeros(len(rows), length, dtype=torch.long)
        position_ids[:, : len(self.prefix)] = torch.arange(len(self.prefix))
        position_ids[:, len(self.prefix) : head] = len(self.prefix) + kept
        segment_ids = torch.full((len(rows), length), -1)
        segment_ids[:, :head] = 0
        for row, (ids, positions, segments, _) in enumerate(rows):
            input_ids[row, head : head + len(ids)] = torch.tensor(ids)
            position_ids[row, head : head + len(ids)] = torch.tensor(positions)
            segment_ids[row, head : head + len(ids)] = torch.tensor(segments)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        seen = causal & (same | (segment_ids[:, None, :] == 0))
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
        where = [(row, *entry) for row, parts in enumerate(rows) for entry in parts[3]]
        row_index, column, target, weight = zip(*where, strict=True)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "mask": mask[:, None],
            "prefix": len(self.prefix),
            "rows": torch.tensor(row_index),
            "columns": torch.tensor(column),
            "targets": torch.tensor(target),
            "weights": torch.tensor(weight),
        }


def embed(
    model: LlavaForConditionalGeneration, visual: torch.Tensor, kept: torch.Tensor, packed: dict[str, Any]
) -> torch.Tensor:
    """What enters the language model: text, and of all visual tokens those to feed, behind the prefix."""
    chosen = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
    text = model.get_input_embeddings()(packed["input_ids"]).to(visual.dtype)
    return torch.cat([text[:, : packed["prefix"]], chosen, text[:, packed["prefix"] + kept.shape[1] :]], 1)


def logits_of(model: LlavaForConditionalGeneration, embeddings: torch.Tensor, packed: dict[str, Any]) -> torch.Tensor:
    """Logits at the supervised places."""
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=packed["mask"], position_ids=packed["position_ids"], use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[packed["rows"], packed["columns"]]).float()


def thing_to_background(attention: torch.Tensor, labels: data.Labels) -> torch.Tensor:
    """How much more attention things get than background in the same row of patches, as a mean of logarithms.

    Comparing within a row makes this blind to where in the sequence a token is.

    Args:
        attention: to the visual tokens, shape (questions, 196).
        labels: of each question's image.
    """
    rows, things, ground = (
        values.unflatten(1, (GRID, GRID)) for values in (attention, labels.on_thing, labels.kind == data.BACKGROUND)
    )
    both = things.any(2) & ground.any(2)
    to_things, to_ground = ((rows * chosen).sum(2)[both] / chosen.sum(2)[both] for chosen in (things, ground))
    return (to_things / to_ground).log().mean()


def unattended(work: Path, seed: int, steps: int = 40) -> torch.Tensor:
    """A vector that the pretrained first layers attend to `LESS_ATTENDED` times less than to words for things.

    Pretrained layers attend to some vectors much more than to others: to a line break, for instance, ten times as much
    as to a colour. Background is most of every picture, so what it looks like decides what attention is spent on.
    Gradient steps on this one vector, starting from a faint thing, on scenes of word embeddings.
    """
    model, tokenizer = make_model(work, seed)
    model.requires_grad_(False)
    language_model = model.model.language_model
    language_model.layers = language_model.layers[:FROZEN_LAYERS]
    alignment, packer = Alignment(tokenizer, model.get_input_embeddings().weight), Packer(tokenizer)
    start = alignment.background
    vector = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([vector], lr=0.02)
    for step in range(steps):
        seeds = [(data.TRAIN, 7, seed, step, row) for row in range(8)]
        batch = data.scenes(*seeds)
        labels = data.labels(batch)
        kept = torch.arange(TOKENS).expand(len(batch), -1)
        packed = packer([questions_of(scene, *one)[:6] for scene, one in zip(batch, seeds, strict=True)], kept)
        visual = vector.expand(len(batch), TOKENS, -1).clone()
        visual[labels.on_thing] = alignment.targets(labels)
        attention = language_model(
            inputs_embeds=embed(model, visual, kept, packed),
            attention_mask=packed["mask"],
            position_ids=packed["position_ids"],
            use_cache=False,
            output_attentions=True,
        ).attentions[-1]
        rows, columns = packed["rows"][::2], packed["columns"][::2]  # where the first word of each answer is predicted
        seen = attention[rows, :, columns, packed["prefix"] : packed["prefix"] + TOKENS].mean(1)
        ratio = thing_to_background(seen, labels.of(rows))
        loss = (ratio - math.log(LESS_ATTENDED)).square() + 0.01 * (vector - start).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"background: {ratio.exp().item():.1f} times less attended than things, norm {vector.norm().item():.2f}")
    return vector.detach()


def align(args: argparse.Namespace) -> None:
    """Stage 3: choose what background looks like and solve for the projector; writes `projector.pt`.

    The first layer spreads the tower's features, decorrelated, over random directions; the second is the ridge
    regression from there to the word embeddings. A few seconds do what gradient steps take thousands of batches for,
    because the features' variances span five orders of magnitude.
    """
    work = Path(args.work)
    model, tokenizer = make_model(work, args.seed)
    background = unattended(work, args.seed)
    alignment = Alignment(tokenizer, model.get_input_embeddings().weight, background)
    inputs, outputs, importance = [], [], []
    for first in range(0, args.images, 32):
        batch = data.scenes(*[(data.TRAIN, 1, args.seed, first + row) for row in range(32)])
        labels = data.labels(batch)
        with torch.no_grad():
            features = model.model.vision_tower(data.pixel_values(batch)).last_hidden_state[:, 1:]
        ground = features[labels.kind == data.BACKGROUND][::8]
        inputs += [features[labels.on_thing], ground]
        outputs += [alignment.targets(labels), background.expand(len(ground), -1)]
        importance += [torch.ones(len(inputs[-2])), torch.full((len(ground),), BACKGROUND_WEIGHT)]
    x, y, weight = torch.cat(inputs), torch.cat(outputs), torch.cat(importance)[:, None]
    variances, directions = torch.linalg.eigh(torch.cov(x.T))
    whiten = (directions * (variances + 0.1 * variances.mean()).rsqrt()) @ directions.T
    projector = model.model.multi_modal_projector
    width = projector.linear_1.out_features
    torch.manual_seed(args.seed)
    with torch.no_grad():
        projector.linear_1.weight.copy_(torch.randn(width, x.shape[1]) * x.shape[1] ** -0.5 @ whiten)
        projector.linear_1.bias.copy_(0.5 * torch.randn(width) - projector.linear_1.weight @ x.mean(0))
        hidden = torch.cat([projector.act(projector.linear_1(x)), torch.ones(len(x), 1)], 1)
        gram = (hidden * weight).T @ hidden
        gram += 0.01 * gram.diagonal().mean() * torch.eye(width + 1)
        solution = torch.linalg.solve(gram, (hidden * weight).T @ y)
        projector.linear_2.weight.copy_(solution[:-1].T)
        projector.linear_2.bias.copy_(solution[-1])
        fit = F.cosine_similarity(projector(x), y)
    print(f"{len(x)} patches, mean cosine to the target {fit.mean():.3f}")
    torch.save({"projector": projector.state_dict(), "background": background}, work / "projector.pt")


def tune(args: argparse.Namespace) -> None:
    """Stage 4: train on questions; resumes from `joint.pt`, which it leaves in `args.work`."""
    work = Path(args.work)
    model, tokenizer = make_model(work, args.seed)
    heads = vision.PatchHeads(vision.CONFIG["hidden_size"])
    tower = torch.load(work / "vision.pt", weights_only=True)["model"]
    heads.load_state_dict({k[2:]: v for k, v in tower.items() if k.startswith("1.")})
    aligned = torch.load(work / "projector.pt", weights_only=True)
    model.model.multi_modal_projector.load_state_dict(aligned["projector"])
    alignment = Alignment(tokenizer, model.get_input_embeddings().weight, aligned["background"])
    everything = nn.ModuleList([model, heads])
    inner = model.model
    inner.language_model.embed_tokens.requires_grad_(False)
    inner.language_model.layers[:FROZEN_LAYERS].requires_grad_(False)
    rates = [
        (inner.language_model.layers[FROZEN_LAYERS:], args.rate),
        (inner.language_model.norm, args.rate),
        (inner.multi_modal_projector, 5e-5),  # its inputs are large: a higher rate makes its outputs jump about
        (inner.vision_tower, 1e-4),
        (heads, 5e-4),
    ]
    groups = [{"params": list(module.parameters()), "lr": rate, "rate": rate} for module, rate in rates]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    path, first = work / "joint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        everything.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    packer = Packer(tokenizer)
    start, right, asked = time.monotonic(), dict.fromkeys(WEIGHTS, 0), dict.fromkeys(WEIGHTS, 0)
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * vision.trapezoid(step, args.steps, 30)
        most, count, images = difficulty(step / args.steps)
        seeds = [(data.TRAIN, 2, args.seed, step, row) for row in range(images)]
        batch = data.scenes(*seeds, most=most)
        labels = data.labels(batch)
        questions = [questions_of(scene, *seed) for scene, seed in zip(batch, seeds, strict=True)]
        kept = torch.arange(TOKENS).expand(images, -1)
        if count < TOKENS:
            kept = keep_some(labels, count, np.random.RandomState([data.TRAIN, 3, args.seed, step]))
        packed = packer(questions, kept)
        with torch.autocast("cpu", torch.bfloat16):
            features = inner.vision_tower(data.pixel_values(batch)).last_hidden_state[:, 1:]
            # The residual stream takes on this type, and half precision is too coarse to train it in.
            visual = inner.multi_modal_projector(features).float()
            logits = logits_of(model, embed(model, visual, kept, packed), packed)
            answers = F.cross_entropy(logits, packed["targets"], reduction="none")
            loss = (answers * packed["weights"]).sum() / packed["weights"].sum()
            total = loss + 0.3 * heads.loss(features, labels)
            total = total + 0.3 * alignment.loss(visual, labels)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        optimizer.step()
        hits = (logits.argmax(-1) == packed["targets"])[::2].tolist()
        for question, hit in zip((one for some in questions for one in some), hits, strict=True):
            right[question.type] += hit
            asked[question.type] += 1
        if (step + 1) % 20 == 0 or step == first:
            scores = ", ".join(f"{name} {right[name] / max(asked[name], 1):.2f}" for name in right)
            pace = (time.monotonic() - start) / (step - first + 1)
            print(
                f"step {step + 1} loss {loss.item():.3f} total {total.item():.3f} {pace:.2f} s/step; {scores}",
                flush=True,
            )
            right, asked = dict.fromkeys(WEIGHTS, 0), dict.fromkeys(WEIGHTS, 0)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            torch.save({"model": everything.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path)
