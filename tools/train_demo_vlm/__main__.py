"""Train, export and evaluate the embedded model; README.md has the exact commands in their order."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import torch


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m tools.train_demo_vlm", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    vision = commands.add_parser("vision", help="stage 1: the vision tower on patch labels")
    vision.add_argument("--steps", type=int, default=2000)
    vision.add_argument("--batch", type=int, default=32)
    vision.add_argument("--rate", type=float, default=1.5e-3)
    vision.set_defaults(module="vision", function="run")

    language = commands.add_parser("language", help="stage 2: truncate SmolLM2-135M-Instruct and trim its vocabulary")
    language.add_argument("--gguf", required=True, help="path of SmolLM2-135M-Instruct.Q4_1.gguf")
    language.add_argument("--layers", type=int, default=10)
    language.set_defaults(module="language", function="run")

    align = commands.add_parser("align", help="stage 3: the projector towards word embeddings")
    align.add_argument("--images", type=int, default=1024)
    align.set_defaults(module="joint", function="align")

    tune = commands.add_parser("tune", help="stage 4: all but the first layers, on questions")
    tune.add_argument("--steps", type=int, default=900)
    tune.add_argument("--rate", type=float, default=1e-3, help="learning rate of the later language-model layers")
    tune.set_defaults(module="joint", function="tune")

    export = commands.add_parser("export", help="write the folder that evengaze.demo.load reads")
    export.add_argument("--out", default="src/evengaze/demo/weights")
    export.set_defaults(module="export", function="run")

    evaluate = commands.add_parser("evaluate", help="accuracy by question type and controls; --bias: attention bias")
    evaluate.add_argument("--model", default="src/evengaze/demo/weights", help="folder of an exported model")
    evaluate.add_argument("--split", default="eval", choices=("eval", "calibration"))
    evaluate.add_argument("--images", type=int, help="how many pictures of the split (default: all)")
    evaluate.add_argument("--batch", type=int, default=16)
    evaluate.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    evaluate.add_argument("--bias", action="store_true", help="print the attention bias of every layer too")
    evaluate.add_argument("--dense-only", action="store_true", help="skip the wrong-image and no-image controls")
    evaluate.add_argument("--json", help="also write the figures to this file")
    evaluate.set_defaults(module="evaluate", function="run")

    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--work", default="runs/demo_vlm", help="folder for checkpoints")
    return top


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    getattr(import_module(f".{args.module}", __package__), args.function)(args)


if __name__ == "__main__":
    main()
