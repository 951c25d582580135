"""The code of the documentation's pages. `python tests/docs/pages.py` runs all Python of them on the embedded model.

A block is run, or a comment in front of it says why not: `<!-- not run: why -->`, or `<!-- needs: package -->`, which
runs it where the package is installed. Names that transformers would give are there: model, processor, image, prompt,
inputs; a hub's name stands for the embedded model.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|needs): (?P<why>[^>]+?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A fenced piece of a page."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None
    needs: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text[: found.start("code")].count("\n") + 1
        mark, why = found["mark"], found["why"]
        yield Block(
            page,
            line,
            found["language"],
            found["code"],
            why if mark == "not run" else None,
            why if mark == "needs" else None,
        )


def prelude() -> dict[str, Any]:
    """What a page may take for granted."""
    import transformers

    import evengaze as eg

    model, processor = eg.demo.load()
    picture = eg.demo.make_dataset("eval", images=1)[0]
    eager, _ = eg.demo.load()
    eager.set_attn_implementation("eager")
    image, prompt = picture.image, picture.questions[0].prompt
    transformers.AutoModelForImageTextToText.from_pretrained = lambda *a, **k: model
    transformers.AutoProcessor.from_pretrained = lambda *a, **k: processor
    return {
        "eg": eg,
        "model": model,
        "processor": processor,
        "picture": picture,
        "image": image,
        "prompt": prompt,
        "inputs": processor(images=image, text=prompt, return_tensors="pt"),
        "data": [(one.image, one.questions[0].prompt) for one in eg.demo.make_dataset("calibration", images=4)],
        "eager_model": eager,
        "__name__": "page",
    }


def run(pages: list[Path]) -> int:
    """Run the pages' Python; each page is one program."""
    import matplotlib

    matplotlib.use("Agg")
    failed = 0
    for page in pages:
        names: dict[str, Any] | None = None
        for block in blocks(page):
            if block.language != "python" or block.not_run is not None:
                continue
            if block.needs is not None and find_spec(block.needs) is None:
                print(f"skipped {block.place}: {block.needs} is not installed")
                continue
            names = prelude() if names is None else names
            with tempfile.TemporaryDirectory() as folder:
                here = Path.cwd()
                os.chdir(folder)
                try:
                    module = type(sys)("page")
                    module.__dict__.update(names)
                    sys.modules["page"] = module  # dataclasses look their module up
                    exec(compile("\n" * (block.line - 1) + block.code, block.place, "exec"), names)
                    print(f"ran {block.place}")
                except Exception:
                    failed += 1
                    print(f"FAILED {block.place}\n{traceback.format_exc()}")
                finally:
                    os.chdir(here)
    return failed


if __name__ == "__main__":
    given = [Path(name).resolve() for name in sys.argv[1:]]
    sys.exit(min(1, run(given or PAGES)))
