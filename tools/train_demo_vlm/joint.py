"""Stages 3 and 4: the projector learns to speak the word embeddings' language, then everything is tuned together."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

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
FIRST_LAYERS = 2  # these keep closer to the pretrained model than the later ones
FIRST_LAYERS_SHARE = 0.3  # of the others' learning rate


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
    apart in full. Background should look, at a low weight, like a line break or faintly like any such word. Padding is
    left alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, background: str):
        self.faint = background == "faint"
        self.kinds, self.colors, self.positions = (
            [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]
            for words in (KINDS, COLORS, POSITIONS)
        )
        self.newline = tokenizer.encode("\n", add_special_tokens=False)[0]

    def targets(self, words: torch.Tensor, labels: data.Labels) -> torch.Tensor:
        """For the patches on things, in order, the vector to resemble, from the embedding matrix `words`."""
        shown = labels.on_thing
        position = labels.position[shown]
        kinds, colors, positions = (words[ids] for ids in (self.kinds, self.colors, self.positions))
        known = (position >= 0)[:, None] * 0.5
        return (
            torch.cat([kinds, colors]).mean(0)
            + (kinds - kinds.mean(0))[labels.kind[shown] - 1]
            + (colors - colors.mean(0))[labels.color[shown] - 1]
            + known * (positions - positions.mean(0))[position.clamp(min=0)]
        )

    def background(self, words: torch.Tensor) -> torch.Tensor:
        """The vector for patches of background."""
        return words[self.kinds + self.colors].mean(0) / 2 if self.faint else words[self.newline]

    def loss(self, projected: torch.Tensor, words: torch.Tensor, labels: data.Labels) -> torch.Tensor:
        words = words.detach().float()
        on_thing = (projected[labels.on_thing].float() - self.targets(words, labels)).square().mean()
        background = projected[labels.kind == data.BACKGROUND].float()
        return (on_thing + BACKGROUND_WEIGHT * (background - self.background(words)).square().mean()) / words.var()


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


def difficulty(progress: float, hard: bool) -> tuple[int, int, int]:
    """How hard the scenes are at a share of the steps: with one thing there is nothing to confuse.

    Args:
        progress: the share of the steps done.
        hard: begin with all things at once, because the model has learnt to look things up.

    Returns:
        The largest number of things, how many visual tokens to feed and how many images make a batch.
    """
    most = 6 if hard else 1 + sum(progress >= threshold for threshold in (0.12, 0.20, 0.28, 0.36, 0.44))
    kept = KEPT_TOKENS - 8 * (6 - most) if progress < FIRST_PART else TOKENS
    return most, kept, (24, 16, 12, 10, 8, 8)[most - 1]


class Packer:
    """Packs many questions behind one image so that none sees another, each at its own true position."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.prefix = self.encode(language.PREFIX)
        self.pad = tokenizer.pad_token_id

    def __call__(self, batch: list[list[Question]], kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pack.

        Args:
            batch: the questions of each image.
            kept: ascending raster indices of the visual tokens that are fed, shape (images, n).

        Returns:
            input_ids of the text (images, s) with the visual tokens' places padded, position_ids (images, s), mask
            (images, 1, s, s), and for every supervised token rows, columns (of the state that predicts it), targets and
            weights.
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
            "rows": torch.tensor(row_index),
            "columns": torch.tensor(column),
            "targets": torch.tensor(target),
            "weights": torch.tensor(weight),
        }


def logits_of(
    model: LlavaForConditionalGeneration,
    visual: torch.Tensor,
    kept: torch.Tensor,
    packed: dict[str, torch.Tensor],
    prefix: int,
) -> torch.Tensor:
    """Logits at the supervised places, from all projected visual tokens and the indices of those to feed."""
    chosen = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
    text = model.get_input_embeddings()(packed["input_ids"]).to(visual.dtype)
    embeddings = torch.cat([text[:, :prefix], chosen, text[:, prefix + kept.shape[1] :]], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=packed["mask"], position_ids=packed["position_ids"], use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[packed["rows"], packed["columns"]]).float()


def load_start(path: Path, *modules: nn.Module) -> None:
    """Load the model, and if given the patch heads, of an earlier tuning."""
    saved = torch.load(path, weights_only=True, mmap=True)["model"]
    for number, module in enumerate(modules):
        module.load_state_dict({k[2:]: v for k, v in saved.items() if k.startswith(f"{number}.")})


def align(args: argparse.Namespace) -> None:
    """Stage 3: solve for the projector; writes `projector.pt`.

    The first layer spreads the tower's features, decorrelated, over random directions; the second is the ridge
    regression from there to the word embeddings. A few seconds do what gradient steps take thousands of batches for,
    because the features' variances span five orders of magnitude.
    """
    work = Path(args.work)
    model, tokenizer = make_model(work, args.seed)
    if args.start:
        load_start(Path(args.start), model)
    alignment, words = Alignment(tokenizer, args.background), model.get_input_embeddings().weight.detach()
    inputs, outputs, importance = [], [], []
    for first in range(0, args.images, 32):
        batch = data.scenes(*[(data.TRAIN, 1, args.seed, first + row) for row in range(32)])
        labels = data.labels(batch)
        with torch.no_grad():
            features = model.model.vision_tower(data.pixel_values(batch)).last_hidden_state[:, 1:]
        background = features[labels.kind == data.BACKGROUND][::8]
        inputs += [features[labels.on_thing], background]
        outputs += [alignment.targets(words, labels), alignment.background(words).expand(len(background), -1)]
        importance += [torch.ones(len(inputs[-2])), torch.full((len(background),), BACKGROUND_WEIGHT)]
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
    torch.save(projector.state_dict(), work / "projector.pt")


def tune(args: argparse.Namespace) -> None:
    """Stage 4: train everything on questions; resumes from `joint.pt`, which it leaves in `args.work`."""
    work = Path(args.work)
    model, tokenizer = make_model(work, args.seed)
    heads = vision.PatchHeads(vision.CONFIG["hidden_size"])
    alignment = Alignment(tokenizer, args.background)
    tower = torch.load(work / "vision.pt", weights_only=True)["model"]
    heads.load_state_dict({k[2:]: v for k, v in tower.items() if k.startswith("1.")})
    if args.start:
        load_start(Path(args.start), model, heads)
    model.model.multi_modal_projector.load_state_dict(torch.load(work / "projector.pt", weights_only=True))
    everything = nn.ModuleList([model, heads])
    inner = model.model
    rates = [
        (inner.language_model.layers[FIRST_LAYERS:], args.rate),
        (inner.language_model.norm, args.rate),
        (inner.language_model.layers[:FIRST_LAYERS], FIRST_LAYERS_SHARE * args.rate),
        (inner.language_model.embed_tokens, FIRST_LAYERS_SHARE * args.rate),
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
        most, count, images = difficulty(step / args.steps, hard=bool(args.start))
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
            logits = logits_of(model, visual, kept, packed, len(packer.prefix))
            answers = F.cross_entropy(logits, packed["targets"], reduction="none")
            loss = (answers * packed["weights"]).sum() / packed["weights"].sum()
            total = loss + 0.3 * heads.loss(features, labels)
            total = total + 0.3 * alignment.loss(visual, model.get_input_embeddings().weight, labels)
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
