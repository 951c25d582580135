"""Starts the explorer; says so if its packages are not installed."""

from __future__ import annotations

import os
import sys
from typing import Any

from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.evaluate.uploads import PIXELS
from evengaze.extras import require
from evengaze.serve.ports import check_free


def run(
    spec: ModelSpec,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    megabytes: int = 20,
    pixels: int = PIXELS,
    new_tokens: int = 16,
    block: bool = True,
) -> Any:
    """Show the page until interrupted; or, without `block`, return it, to be closed by its `close()`.

    Raises:
        MissingExtraError: Gradio is not installed.
        EvengazeError: the model cannot be loaded, or the port is taken.
    """
    require("explore", "evengaze explore", "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing leaves this machine
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio as gr

    from evengaze.explore.findings import Explorer
    from evengaze.explore.page import CSS, build_page

    check_free(host, port)
    page = build_page(Explorer(Predictor.load(spec), new_tokens), pixels)
    page.launch(
        server_name=host,
        server_port=port or None,
        inbrowser=open_browser,
        share=False,
        prevent_thread_lock=True,
        max_file_size=f"{megabytes}mb",
        quiet=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(),
        css=CSS,
    )
    if block:
        print(f"The explorer is at {page.local_url} until you press Ctrl-C", file=sys.stderr, flush=True)
        page.block_thread()
    return page
