"""Dependencies point inwards: what prunes knows no method, no way of debiasing, and nothing of what uses it."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import evengaze.engine
import evengaze.methods
import evengaze.models

CORE = ("compat", "engine", "layout", "protocol", "schedule", "trace")
USERS = ("cli", "demo", "evaluate", "explore", "profile", "serve", "testing", "viz")


def loaded_with(*modules: str) -> set[str]:
    """Which parts of the package a fresh interpreter has loaded after importing some."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {m.split(".")[1] for m in done.stdout.split() if m.startswith("evengaze.")}
    assert "protocol" in found
    return found


def modules_of(package) -> list[str]:
    return [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


def test_the_core_imports_no_method_no_debiasing_and_none_of_its_users():
    every = [f"evengaze.{name}" for name in CORE] + modules_of(evengaze.engine) + modules_of(evengaze.models)
    assert not loaded_with(*every) & {"methods", "debias", "calibration", *USERS}


def test_methods_import_no_calibration_and_none_of_their_users():
    every = modules_of(evengaze.methods)
    assert "evengaze.methods.official.masked" in every and "evengaze.methods._template" in every
    assert not loaded_with(*every) & {"calibration", *USERS}


def test_what_a_method_is_made_of_comes_from_one_place():
    from evengaze import protocol
    from evengaze.methods import base, stages

    assert evengaze.methods.Pruner is base.Pruner
    for name in ("Stage", "View", "Selection", "Merge", "resolve_keep", "top_allowed"):
        assert getattr(evengaze.methods, name) is getattr(protocol, name)
    for name in ("OneStage", "ManyStages", "Grouping"):
        assert getattr(evengaze.methods, name) is getattr(stages, name)
