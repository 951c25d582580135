"""Options that several commands share, with the same name and meaning in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = "Model"

Model = Annotated[
    str, typer.Option("--model", help="Hub id, local folder, or 'demo' (embedded).", rich_help_panel=_MODEL)
]
Revision = Annotated[
    str | None, typer.Option(help="Commit, branch or tag of the model on the hub.", rich_help_panel=_MODEL)
]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda:1, ..., or balanced (several GPUs).", rich_help_panel=_MODEL)
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention implementation: sdpa, eager, flash_attention_2, ...; `evengaze env` lists yours.",
        rich_help_panel=_MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="LoRA to put on the model: local folder or hub id (needs peft).", rich_help_panel=_MODEL),
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Quantise the weights on loading: 8bit or 4bit (needs bitsandbytes).", rich_help_panel=_MODEL),
]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing",
        help="Load a checkpoint that lacks weights, with random numbers for them.",
        rich_help_panel=_MODEL,
    ),
]

Images = Annotated[
    Path | None,
    typer.Option(
        help="Folder of pictures or of videos, or .jsonl of {image or video, prompt} such as LLaVA's question files. "
        "Default, for 'demo': the embedded set."
    ),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Asked in turn; repeatable.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use so many samples, spread evenly.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples a forward call.")]
Formats = Annotated[
    str, typer.Option("--formats", help="Of the figures: png, pdf, svg; several with commas, 'png,pdf'.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
