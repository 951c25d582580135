"""Compare with what the official code did: `python tests/parity/run.py --data DIR [--method fastv]`.

DIR holds cases.json, weights.json and the arrays they name. Every case of an implemented method runs through the public
API, and all of its arrays are compared at the tolerances that the folder states. For each case with a padding mask, the
corrected mode is run as well, and must neither keep nor recycle padding.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evengaze.methods.fastv import FastV
from evengaze.methods.official import FastVMasked
from parity.record import Folder, Report, run
from parity.set_a import SetA
from parity.set_b import SetB


def suite(path: Path, attention: str = "eager") -> Any:
    """The cases of a folder, in either format."""
    folder = Folder(path, attention)
    return SetB(folder) if "shared_files" in folder.index else SetA(folder)


def check(cases: Any, case: dict[str, Any]) -> list[str]:
    """Failures of one case, of what corrected mode does with padding included."""
    report = Report(cases.folder.arrays(case["file"]))
    cases.check(case, report)
    return report.finish() + padding_used(cases, case)


def has_padding_mask(cases: Any, case: dict[str, Any]) -> bool:
    pruner = cases.pruner(case)
    return pruner is not None and pruner.debias is not None and pruner.debias.padding is not None


def padding_used(cases: Any, case: dict[str, Any]) -> list[str]:
    """Padding that corrected mode keeps, recycles or merges; none is right."""
    if not has_padding_mask(cases, case):
        return []
    pruner = cases.pruner(case)
    embeds, layout = cases.prompt(case)
    if isinstance(pruner, FastVMasked):
        pruner = FastV(pruner.keep, pruner.layer, debias=pruner.debias)
    pruner = pruner.replace(mode="corrected")
    failures = []
    for entry in run(cases.model, embeds, [], pruner, layout).log:
        valid, selection = pruner.debias.valid(entry.tokens), entry.selection
        used = [selection.keep] + [t for t in (selection.recycled,) if t is not None]
        used += [selection.merge.source, selection.merge.target] if selection.merge is not None else []
        if not bool(valid[torch.cat(used)].all()):
            failures.append(f"corrected mode uses padding at stage {entry.view.stage}")
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cases.json and weights.json")
    parser.add_argument("--method", help="only this method (fastv, pyramiddrop, sparsevlm, himap, ...)")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="also cases that record quirks for information")
    parser.add_argument("--attention", default="eager", help="attention implementation: eager, sdpa")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    cases = suite(options.data, options.attention)
    passed = failed = skipped = masked = 0
    for case in cases.cases():
        name, method = cases.name(case), cases.method(case)
        if (options.method and options.method.lower() != method) or (options.case and options.case not in name):
            continue
        if case.get("skip_for_parity") and not options.all:
            print(f"skip  {name}")
            skipped += 1
            continue
        failures = check(cases, case)
        print(f"{'FAIL' if failures else 'ok  '}  {name}", *failures, sep="\n        " if failures else "")
        passed, failed = passed + (not failures), failed + bool(failures)
        masked += has_padding_mask(cases, case) and not any("corrected mode" in f for f in failures)
    print(f"corrected mode kept, recycled and merged no padding in {masked} cases with padding masks")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
