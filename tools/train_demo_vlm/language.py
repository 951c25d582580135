"""Stage 2: the first layers of SmolLM2-135M-Instruct with a vocabulary trimmed to what the questions need."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from evengaze.demo.scenes import COLORS, KINDS, NUMBERS, PLURALS, POSITIONS, SHAPES

PREFIX = "<|im_start|>User:"
IMAGE_TOKEN = "<image>"
SPARE_TOKEN = "<file_sep>"  # a special token that this model has no use for becomes the image placeholder
BASIC_IDS = 1024  # special tokens, all bytes and the most frequent pieces
KEPT_CONFIG = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rope_parameters",
    "initializer_range",
)
NORM_SCALE = 0.25  # the output of a truncated stack is too large for the final norm of the whole one


def prompt(question: str) -> str:
    """What follows the image."""
    return f"\n{question}\nAssistant:"


def corpus() -> list[str]:
    """Texts whose tokens the trimmed vocabulary has to contain."""
    questions = [f"what color is the {kind}?" for kind in KINDS] + [f"where is the {kind}?" for kind in KINDS]
    questions += [f"what {family} is {color}?" for family in ("shape", "digit") for color in COLORS]
    questions += [f"how many {PLURALS[shape]} are there?" for shape in SHAPES]
    for article in ("a", "an"):
        questions += [f"is there {article} {color} {kind}?" for color in COLORS for kind in KINDS]
        questions += [f"is there {article} {kind}?" for kind in KINDS]
    answers = [*COLORS, *SHAPES, *NUMBERS, *POSITIONS, "yes", "no"]
    return [PREFIX + prompt(question) for question in questions] + [f" {answer}<|im_end|>" for answer in answers]


def pieces(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """Every intermediate piece that byte-pair encoding passes on the way from characters to `token`."""
    parts, seen = list(token), set(token)
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda at: ranks.get((parts[at], parts[at + 1]), len(ranks)))
        if (parts[best], parts[best + 1]) not in ranks:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
        seen.add(parts[best])
    return seen


def trim(full: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """A tokenizer with fewer entries that encodes `corpus()` alike.

    Returns:
        The tokenizer, and for each of its ids the id in the full one.
    """
    state: dict[str, Any] = json.loads(full.to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(state["model"]["merges"])}
    names = {index: token for token, index in vocabulary.items()}
    kept = set(range(BASIC_IDS))
    for text in corpus():
        for index in full.encode(text, add_special_tokens=False).ids:
            kept |= {vocabulary[piece] for piece in pieces(names[index], ranks) if piece in vocabulary}
            kept.add(index)
    order = sorted(kept)
    new = {names[index]: position for position, index in enumerate(order)}
    state["model"]["vocab"] = new
    state["model"]["merges"] = [[a, b] for a, b in state["model"]["merges"] if {a, b, a + b} <= new.keys()]
    text = json.dumps(state).replace(json.dumps(SPARE_TOKEN), json.dumps(IMAGE_TOKEN))
    trimmed = Tokenizer.from_str(text)
    for text in corpus():
        ids = trimmed.encode(text, add_special_tokens=False).ids
        if [order[index] for index in ids] != full.encode(text, add_special_tokens=False).ids:
            raise RuntimeError(f"the trimmed tokenizer encodes {text!r} differently")
    return trimmed, order


def run(args: argparse.Namespace) -> None:
    """Write `language.pt` and `tokenizer/` into `args.work`."""
    source, file = args.gguf.rsplit("/", 1)
    full = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer, order = trim(full.backend_tokenizer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    wrapped.save_pretrained(Path(args.work) / "tokenizer")
    base: LlamaConfig = model.config
    config = {key: getattr(base, key) for key in KEPT_CONFIG}
    config["rms_norm_eps"] = round(base.rms_norm_eps, 9)  # the file holds it in single precision
    config |= {
        "vocab_size": len(order),
        "num_hidden_layers": args.layers,
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|im_end|>"),
        "tie_word_embeddings": True,
    }
    weights = {}
    for name, value in model.model.state_dict().items():
        if name.startswith("layers.") and int(name.split(".")[1]) >= args.layers:
            continue
        weights[name] = value[order].clone() if name == "embed_tokens.weight" else value.clone()
    weights["norm.weight"] *= NORM_SCALE
    torch.save({"config": config, "weights": weights}, Path(args.work) / "language.pt")
    parameters = sum(value.numel() for value in weights.values())
    print(f"{len(order)} tokens, {args.layers} layers, {parameters / 1e6:.1f} M parameters, config {config}")
