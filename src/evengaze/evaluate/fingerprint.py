"""What answers depend on, kept beside them, so that a resumed run cannot mix two settings."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.media import media_name
from evengaze.files import read_json, write_whole
from evengaze.methods import Pruner

FILE = "fingerprint.json"
_PACKAGES = ("evengaze", "torch", "transformers", "tokenizers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that answers depend on."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_pruner(pruner: Pruner) -> dict[str, Any]:
    """The method's parameters, with the hash of its debiasing in place of the curve's samples."""
    values = json.loads(json.dumps(pruner.to_dict()))
    if values.get("debias") is not None:
        values["debias_hash"] = digest(values["debias"])
    own = method_source(type(pruner))
    return dict(values) | ({} if own is None else {"source": own})


def method_source(method: type) -> str | None:
    """What tells a method from outside this package from its earlier and later states; None for one of its own.

    Its `version` if it has one, else a digest of the files that it and its bases are written in, or, where there are
    none, of their compiled functions.
    """
    outside = [
        c for c in method.__mro__ if c.__module__.partition(".")[0] not in ("evengaze", "builtins", "abc", "typing")
    ]
    if not outside:
        return None
    version = getattr(method, "version", None)
    if isinstance(version, (str, int)):
        return f"version {version}"
    total = hashlib.sha256()
    for owner in outside:
        try:
            total.update(Path(inspect.getfile(owner)).read_bytes())
        except (OSError, TypeError):
            total.update(repr(sorted((k, _code(v)) for k, v in vars(owner).items() if callable(v))).encode())
    return total.hexdigest()[:16]


def _code(function: Any) -> tuple[Any, ...]:
    code = getattr(function, "__code__", None)
    return () if code is None else (code.co_code.hex(), [c for c in code.co_consts if isinstance(c, (int, float, str))])


def describe_records(records: Sequence[Record], root: Path) -> dict[str, Any]:
    """The number of questions, and a hash over their keys, texts and the names of their pictures below `root`.

    What the files hold is part of each answer's id instead: a picture that could not be read at first may be mended,
    but what was answered stays bound to what was seen.
    """
    rows = [[record.key, record.prompt, media_name(record, root)] for record in records]
    return {"records": len(records), "hash": digest(rows)}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, as lines `name: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        missing = "(absent)"
        return [
            line
            for key in keys
            for line in differences(old.get(key, missing), new.get(key, missing), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name}: {_short(old)} -> {_short(new)}"]


def stamp(folder: Path, fingerprint: Mapping[str, Any], *, has_answers: bool = False) -> None:
    """Write the fingerprint of a new folder, or check that of an old one.

    Args:
        folder: the folder.
        fingerprint: of what is to be done there.
        has_answers: whether answers are there already; then a fingerprint must be.

    Raises:
        DataError: the folder holds answers of another setting; the message lists every difference.
    """
    path = folder / FILE
    wanted = json.loads(json.dumps(fingerprint))
    if not path.exists():
        if has_answers:
            raise DataError(
                f"{folder} holds answers, but no {FILE} that says what they depend on. Restore it, or give another "
                "out folder."
            )
        write_whole(path, json.dumps(wanted, indent=1) + "\n")
        return
    found = read_json(path, dict, "Give another out folder.")
    changed = differences(found, wanted)
    if changed:
        listed = "\n  ".join(changed)
        raise DataError(
            f"{folder} holds answers of another setting (there -> now):\n  {listed}\nGive another out folder for the "
            f"new setting, restore the old one to go on, or delete {folder} to start anew."
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
