"""Pages of the site that are not in docs/: files of the repository's root, and the API reference from docstrings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "src/evengaze/demo/MODEL_CARD.md": "model-card.md",
}
NOTEBOOKS = ("tour", "own_method", "calibrate", "compare")
REFERENCE = {
    "Use": ["evengaze.methods.base", "evengaze.trace", "evengaze.schedule", "evengaze.errors"],
    "Methods": [
        *(
            f"evengaze.methods.{name}"
            for name in ("fastv", "pyramiddrop", "sparsevlm", "himap", "tokencarve", "illava")
        ),
        *(f"evengaze.methods.{name}" for name in ("visionzip", "divprune", "tome", "baselines", "stages", "registry")),
    ],
    "Debiasing": [
        *(f"evengaze.debias.{name}" for name in ("debias", "padding", "trend", "curve", "presets", "beyond")),
        *(f"evengaze.calibration.{name}" for name in ("calibrate", "observe", "fit", "measures", "validate")),
    ],
    "Vocabulary": ["evengaze.protocol", "evengaze.layout", "evengaze.pixels"],
    "Models": ["evengaze.models.base", "evengaze.models.registry", "evengaze.models.loading"],
    "Evaluation": [f"evengaze.evaluate.{name}" for name in ("predictor", "conversation", "media", "uploads", "auto")],
    "Serving": [f"evengaze.serve.{name}" for name in ("settings", "schema", "app", "metrics", "errors", "ray_serve")],
    "Testing and profiling": [
        "evengaze.testing.matrix",
        "evengaze.testing.oracle",
        *(f"evengaze.profile.{name}" for name in ("measure", "rows", "verdict", "latency")),
    ],
}
"""Modules of the reference, by section."""


def on_config(config: Any) -> Any:
    """List the reference's pages."""
    for part in config["nav"]:
        if "Reference" in part:
            part["Reference"] = ["reference/index.md", *({s: [_path(m) for m in ms]} for s, ms in REFERENCE.items())]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=_moved(text, source)))
    for name in NOTEBOOKS:
        files.append(File.generated(config, f"examples/{name}.md", content=_notebook(name)))
    index = ["# Reference", "", "From the docstrings; what is not listed here is private.", ""]
    for section, modules in REFERENCE.items():
        index += [f"## {section}", "", *(f"- [`{m}`]({_path(m).removeprefix('reference/')})" for m in modules), ""]
        for module in modules:
            page = f"---\ntitle: {module.removeprefix('evengaze.')}\n---\n\n::: {module}\n"
            files.append(File.generated(config, _path(module), content=page))
    files.append(File.generated(config, "reference/index.md", content="\n".join(index)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that leave docs/ lead to the page that the file has become, or become plain text."""
    depth = page.file.src_uri.count("/")
    up = "../" * (depth + 1)
    for source, target in PAGES.items():
        markdown = markdown.replace(f"]({up}{source}", f"]({'../' * depth}{target}")
    return re.sub(rf"\[([^\]]+)\]\({re.escape(up)}(?:src|benchmarks|examples|tests|tools)/[^)]*\)", r"\1", markdown)


def _moved(text: str, source: str) -> str:
    """A root file's links, as they are from within docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for other, target in PAGES.items():
        text = text.replace(f"]({other}", f"]({target}")
    return re.sub(r"\[([^\]]+)\]\((?:src|benchmarks|examples|tests|tools|LICENSE|CITATION)[^)]*\)", r"\1", text)


def _notebook(name: str) -> str:
    """A notebook's text and code as a page; what the code prints is seen by running it."""
    cells = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    head, *rest = [text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts]
    note = (
        f"*The notebook `examples/{name}.ipynb` of the repository, which a test runs from its first cell to its last.*"
    )
    return "\n\n".join([head, note, *rest]) + "\n"


def _path(module: str) -> str:
    return f"reference/{module.removeprefix('evengaze.')}.md"
