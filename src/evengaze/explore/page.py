"""The page: controls on the left, the three answers beside each other, maps and charts below."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from evengaze.demo.dataset import DemoImage, make_dataset
from evengaze.errors import EvengazeError, out_of_memory
from evengaze.evaluate.uploads import picture_of
from evengaze.explore import draw
from evengaze.explore.findings import METHODS, STEPS, Choice, Explorer
from evengaze.methods import get

if TYPE_CHECKING:
    from PIL.Image import Image

_log = logging.getLogger(__name__)
SAMPLES = 6
_STEPS = {"both": "both steps", "padding": "padding only", "trend": "trend only"}

CSS = """
.eg-panel h3, .eg-maps h3, section h3 {margin: 0 0 .3em; font-size: 1.05em}
.eg-answer {font-size: 1.35em; font-weight: 600; margin: .1em 0 .5em; overflow-wrap: anywhere}
.eg-panel figure, .eg-maps figure {margin: 0 0 .6em}
.eg-panel img, .eg-maps img {width: 100%; border-radius: 4px; display: block}
figcaption, .eg-none, .eg-legend, .eg-note {font-size: .85em; opacity: .85}
.eg-facts {width: 100%; font-size: .9em; border: none !important} .eg-facts th {text-align: left; font-weight: 400}
.eg-facts th, .eg-facts td, .eg-facts tr {border: none !important; padding: .1em 0 !important}
.eg-facts td {text-align: right; font-variant-numeric: tabular-nums}
.eg-row {display: flex; flex-wrap: wrap; gap: 1.2em} .eg-row > * {flex: 1 1 260px; min-width: 0}
.eg-maps .eg-row > * {max-width: 320px} svg {width: 100%; height: auto}
.eg-grid {stroke: currentColor; opacity: .15} .eg-tick {fill: currentColor; opacity: .75; font-size: 11px}
.eg-legend span {margin-right: 1.2em; white-space: nowrap}
.eg-legend i {display: inline-block; width: 22px; margin-right: .4em; vertical-align: middle}
.eg-error {border-left: 4px solid #d1495b; padding: .4em .8em; margin: 0; font-weight: 600}
.eg-preview img {max-height: 180px; max-width: 100%; border-radius: 4px}
"""


@dataclass(frozen=True, eq=False)
class Chosen:
    """The picture of one visitor; told apart by identity, as Gradio hashes what it keeps for a session."""

    name: str
    image: Image


def build_page(explorer: Explorer, pixels: int) -> gr.Blocks:
    """The page for one model; `pixels` is the most that an upload may have."""
    samples = make_dataset("eval", SAMPLES)
    names = [f"picture {number + 1}" for number in range(len(samples))]
    first = samples[0]

    def find(chosen: Chosen | None, question: str, method: str, keep: float, layer: float, steps: str) -> list[Any]:
        chosen = chosen or Chosen(names[0], first.image)
        debiased = "debiased: " + _STEPS[steps]
        try:
            found = explorer.find(chosen.image, str(question or ""), Choice(method, keep / 100, int(layer), steps))
            return [
                draw.panel("dense", found.dense, found),
                draw.panel(f"{method}, plain", found.plain, found),
                draw.no_panel("debiased") if found.debiased is None else draw.panel(debiased, found.debiased, found),
                draw.maps(found),
                draw.charts(found),
                f"<p class='eg-note'>{escape(chosen.name)}: {escape(found.question)} {escape(found.note)}</p>",
            ]
        except Exception as error:
            return [gr.skip()] * 5 + [_error(error)]

    def choose(name: str) -> list[Any]:
        sample = samples[names.index(name)]
        asked = [question.text for question in sample.questions]
        return [Chosen(name, sample.image), gr.Dropdown(choices=asked, value=asked[0]), _preview(sample)]

    def upload(data: bytes | None) -> list[Any]:
        if data is None:
            return [gr.skip()] * 3
        try:
            image = picture_of(data, pixels=pixels)
        except Exception as error:
            return [gr.skip(), gr.skip(), _error(error)]
        return [Chosen("your picture", image), _shown(image, "your picture"), ""]

    def fit(method: str) -> Any:
        single = any(f.name == "layer" for f in fields(get(method)))
        return gr.Slider(interactive=single, label="layer" if single else "layer (set by the method)")

    with gr.Blocks(title=f"Evengaze: {explorer.model}", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(
            f"## Evengaze: what a pruned model still sees\nModel: `{explorer.model}`. Everything runs on this machine."
        )
        chosen = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                sample = gr.Radio(names, value=names[0], label="sample picture", elem_id="sample")
                preview = gr.HTML(_preview(first), elem_id="preview")
                file = gr.File(label="or your own (PNG, JPEG, WEBP, ...)", type="binary", elem_id="upload", height=140)
                asked = [question.text for question in first.questions]
                question = gr.Dropdown(
                    asked, value=asked[0], label="question", allow_custom_value=True, elem_id="question"
                )
                method = gr.Dropdown(list(METHODS), value="fastv", label="method", elem_id="method")
                keep = gr.Slider(2, 100, 25, step=1, label="budget: % of the visual tokens kept", elem_id="keep")
                layer = gr.Slider(1, explorer.layers - 1, 2, step=1, label="layer", elem_id="layer")
                steps = gr.Radio([(_STEPS[s], s) for s in STEPS], value="both", label="debias", elem_id="steps")
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML("", elem_id="status")
                with gr.Row():
                    with gr.Column(min_width=220):
                        dense = gr.HTML(elem_id="dense", min_height=200)
                    with gr.Column(min_width=220):
                        plain = gr.HTML(elem_id="plain", min_height=200)
                    with gr.Column(min_width=220):
                        debiased = gr.HTML(elem_id="debiased", min_height=200)
                heat = gr.HTML(elem_id="maps")
                chart = gr.HTML(elem_id="charts")
        inputs = [chosen, question, method, keep, layer, steps]
        outputs = [dense, plain, debiased, heat, chart, status]
        one = {"concurrency_limit": 1, "concurrency_id": "model"}
        gr.on(
            [page.load, chosen.change, question.change, method.change, keep.change, layer.change, steps.change],
            find,
            inputs,
            outputs,
            trigger_mode="always_last",
            show_progress="minimal",
            api_name="find",
            **one,
        )
        sample.change(choose, sample, [chosen, question, preview], api_name="choose", show_progress="hidden")
        file.change(upload, file, [chosen, preview, status], api_name="upload", show_progress="hidden")
        method.change(fit, method, layer, api_visibility="private", show_progress="hidden")
    page.queue(max_size=32, default_concurrency_limit=4)
    return page


def _error(error: Exception) -> str:
    """A sentence for whoever sees the page; what nobody expected is told to the terminal, too."""
    if isinstance(error, EvengazeError):
        text = str(error)
    elif out_of_memory(error):
        text = "memory ran out; try a smaller picture, or a smaller model"
    else:
        _log.exception("the page could not be answered", exc_info=error)
        text = "something failed that should not; the terminal says why"
    return f"<p class='eg-error' role='alert'>{escape(text[:1].upper() + text[1:])}.</p>"


def _preview(sample: DemoImage) -> str:
    return _shown(sample.image, "the sample")


def _shown(image: Image, name: str) -> str:
    return f"<div class='eg-preview'>{draw.thumbnail(image.copy(), name)}</div>"
