"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", help="Hub id, local folder, or 'demo' (embedded).")]
Revision = Annotated[str | None, typer.Option(help="Commit, branch or tag of the model on the hub.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda:1, ..., or balanced (several GPUs).")]

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
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Load a checkpoint that lacks weights, with random numbers for them.")
]
