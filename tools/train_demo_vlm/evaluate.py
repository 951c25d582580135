"""Accuracy per question type with the right picture, a wrong one and none, and the attention bias of every layer."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evengaze.calibration.fit import fit_scores
from evengaze.calibration.measures import spearman
from evengaze.demo.dataset import DemoImage, DemoQuestion, make_dataset
from evengaze.demo.model import load_model, load_processor
from evengaze.demo.scenes import GRID, TYPES

TOKENS = GRID**2


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def answers(
    model: Any, processor: Any, questions: list[DemoQuestion], images: list[Any] | None, attention: bool = False
) -> tuple[list[str], np.ndarray | None]:
    """The first word of every answer and, if asked for, the last prompt token's attention to the visual tokens.

    Returns:
        Words, and the head mean of shape (questions, layers, 196) or None.
    """
    text = [one.prompt if images else one.prompt.replace("<image>", "") for one in questions]
    inputs = processor(images=images, text=text, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs, output_attentions=attention, use_cache=False, logits_to_keep=1)
    words = [word.strip() for word in processor.batch_decode(output.logits[:, -1].argmax(-1)[:, None])]
    if not attention:
        return words, None
    visual = inputs["input_ids"] == model.config.image_token_id
    rows = [layer[:, :, -1].float().mean(1)[visual].view(len(text), TOKENS) for layer in output.attentions]
    return words, torch.stack(rows, 1).numpy()


def exponential(rows: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Sigma and R^2 of mu * exp(sigma * x), least squares over positions, as `evengaze.calibration` fits it."""
    summary = fit_scores(rows, mask, family="exponential", fit="least-squares", bootstraps=2).summary
    return summary["sigma"], summary["r2"]


def bias_table(records: list[DemoImage], asked: list[DemoQuestion], attention: np.ndarray) -> list[dict[str, float]]:
    """Position and padding bias of every layer from attention of shape (questions, layers, 196)."""
    padding, background, thing = (np.zeros((len(asked), TOKENS), bool) for _ in range(3))
    for row, one in enumerate(asked):
        padding[row, list(records[one.image_index].padding_patches)] = True
        background[row, list(records[one.image_index].background_patches)] = True
        thing[row, list(one.object_patches)] = True
    present = thing.any(1)
    other = ~(padding | background | thing)
    x = np.arange(TOKENS) / TOKENS
    table = []
    for layer in range(attention.shape[1]):
        rows = attention[:, layer]

        def mean(mask: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
            return (rows * mask).sum(0) / np.maximum(mask.sum(0), 1)

        curve, ground, filler = mean(~padding), mean(background), mean(padding)
        sigma, fit = exponential(rows, ~padding)
        ground_sigma, ground_fit = exponential(rows, background)
        weight = np.where((background.sum(0) >= 5) & (padding.sum(0) >= 5), padding.sum(0), 0)
        table.append(
            {
                "layer": layer,
                "spearman": spearman(curve, np.arange(TOKENS)),
                "sigma": sigma,
                "r2": fit,
                "sigma_log": float(np.polyfit(x, np.log(curve), 1)[0]),
                "background_sigma": ground_sigma,
                "background_r2": ground_fit,
                "last_to_first_28": float(curve[-28:].mean() / curve[:28].mean()),
                "padding_to_background": float(rows[padding].mean() / rows[background].mean()),
                "padding_to_background_matched": float((weight * filler).sum() / (weight * ground).sum()),
                "object_to_background": float(
                    rows[present][thing[present]].mean() / rows[present][background[present]].mean()
                ),
                "other_to_background": float(rows[other].mean() / rows[background].mean()),
                "visual_share": float(rows.sum(1).mean()),
            }
        )
    return table


def run(args: argparse.Namespace) -> None:
    """Print the tables; `args.json` also writes them."""
    model, processor = load_model(args.model, getattr(torch, args.dtype)), load_processor(args.model)
    model.set_attn_implementation("eager")  # only this one returns attention weights
    records = make_dataset(args.split, args.images)
    asked = [question for record in records for question in record.questions]
    right: dict[str, dict[str, list[bool]]] = {way: defaultdict(list) for way in ("dense", "wrong image", "no image")}
    attention = []
    for batch in batches(asked, args.batch):
        own = [records[one.image_index].image for one in batch]
        other = [records[(one.image_index + 1) % len(records)].image for one in batch]
        words, rows = answers(model, processor, batch, own, attention=args.bias)
        if rows is not None:
            attention.append(rows)
        ways = {"dense": words}
        if not args.dense_only:
            ways["wrong image"], _ = answers(model, processor, batch, other)
            ways["no image"], _ = answers(model, processor, batch, None)
        for way, given in ways.items():
            for one, word in zip(batch, given, strict=True):
                right[way][one.type].append(word == one.answer)
    print(f"{len(asked)} questions, {len(records)} images, split {args.split}")
    print("| type | questions | most frequent answer | " + " | ".join(right) + " |")
    print("|---|---|---|" + "---|" * len(right))
    summary: dict[str, Any] = {}
    for name in (*TYPES, "all"):
        chosen = [one for one in asked if name in (one.type, "all")]
        prior = sum(
            max(Counter(o.answer for o in chosen if o.type == kind).values()) for kind in {o.type for o in chosen}
        )
        scores = []
        for way in right:
            hits = [hit for kind, some in right[way].items() if name in (kind, "all") for hit in some]
            scores.append(float(np.mean(hits)) if hits else float("nan"))
        summary[name] = {
            "questions": len(chosen),
            "prior": prior / len(chosen),
            **dict(zip(right, scores, strict=True)),
        }
        print(
            f"| {name} | {len(chosen)} | {prior / len(chosen):.3f} | " + " | ".join(f"{s:.3f}" for s in scores) + " |"
        )
    table = bias_table(records, asked, np.concatenate(attention)) if args.bias else []
    if table:
        print("\n| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
    for row in table:
        print(
            "| "
            + " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"accuracy": summary, "bias": table}, indent=2) + "\n", encoding="utf-8")
