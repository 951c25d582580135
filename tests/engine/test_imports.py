"""Dependencies point inwards: what prunes knows no method and no way of debiasing."""

from __future__ import annotations

import subprocess
import sys

CORE = (
    *("attention", "cache", "cut", "engine", "layout", "prefill"),
    *("protocol", "rotary", "schedule", "scope", "steps", "trace"),
)


def test_the_core_imports_no_method_and_no_debiasing():
    code = f"import sys, {', '.join('evengaze.' + name for name in CORE)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "evengaze.protocol" in loaded
    assert not [m for m in loaded if m.startswith(("evengaze.methods", "evengaze.debias", "evengaze.cli"))]
