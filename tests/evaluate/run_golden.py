"""Compare evengaze's scorers with results recorded from the official ones.

    python tests/evaluate/run_golden.py --data DIR

DIR holds ``expected.json`` (one entry a benchmark) and the files that it names: inputs in LLaVA's and Video-LLaVA's
layouts, what the official converters and scorers made of them, recorded judge replies. Every entry is compared; the
last line says ``N passed, N failed``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOLERANCE = 1e-9


class Report:
    """Counts comparisons and names the failed ones."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def check(self, name: str, got: Any, want: Any) -> None:
        """Compare a value with the recorded one; floats within 1e-9."""
        if same(got, want):
            self.passed += 1
        else:
            self.failed.append(f"{name}: got {shorten(got)}, recorded {shorten(want)}")

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Run a group of comparisons; an exception is one failure."""
        try:
            work()
        except Exception as error:
            self.failed.append(f"{name}: {type(error).__name__}: {shorten(error)}")


def same(got: Any, want: Any) -> bool:
    """Deep equality; numbers within the tolerance, NaN equal to NaN."""
    if isinstance(want, dict) and isinstance(got, dict):
        return got.keys() == want.keys() and all(same(got[key], want[key]) for key in want)
    if isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(got) == len(want) and all(map(same, got, want))
    if isinstance(want, float) or isinstance(got, float):
        if not isinstance(got, (int, float)) or not isinstance(want, (int, float)):
            return False
        return abs(got - want) <= TOLERANCE or (math.isnan(got) and math.isnan(want))
    return type(got) is type(want) and got == want


def shorten(value: Any) -> str:
    """Cut a value for a message."""
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}..."


def run(data: Path) -> Report:
    """Compare everything in a folder."""
    import golden_image
    import golden_text
    import golden_video

    expected = json.loads((data / "expected.json").read_text(encoding="utf-8"))
    checks: dict[str, Callable[[Report, Path, Any], None]] = {
        **golden_text.CHECKS,
        **golden_image.CHECKS,
        **golden_video.CHECKS,
    }
    report = Report()
    for name, entry in expected.items():
        if name == "meta":
            continue
        if name not in checks:
            report.failed.append(f"{name}: no comparison is known for this entry")
            continue
        report.run(name, lambda check=checks[name], entry=entry: check(report, data, entry))
    return report


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with expected.json")
    data = parser.parse_args().data
    if not (data / "expected.json").is_file():
        print(f"{data / 'expected.json'} does not exist", file=sys.stderr)
        return 2
    report = run(data)
    for line in report.failed:
        print(f"FAILED {line}")
    for line in report.skipped:
        print(f"skipped {line}")
    skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
    print(f"{report.passed} passed, {len(report.failed)} failed{skipped}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
