from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import run_golden


def test_every_recorded_result_is_reproduced(golden: Path) -> None:
    report = run_golden.run(golden)
    assert report.failed == []
    assert report.skipped == []
    assert report.passed > 4000


def test_command_line_counts_and_fails(golden: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(golden, data)
    expected = json.loads((data / "expected.json").read_text())
    kept = {"meta": expected["meta"], "chunks": expected["chunks"], "conversation": expected["conversation"]}

    def call() -> subprocess.CompletedProcess[str]:
        (data / "expected.json").write_text(json.dumps(kept))
        command = [sys.executable, str(Path(run_golden.__file__)), "--data", str(data)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = call()
    assert good.returncode == 0
    assert good.stdout.splitlines()[-1].endswith(" passed, 0 failed")
    kept["chunks"]["cases"][1]["len"] += 1
    kept["unheard_of"] = {}
    bad = call()
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[-1].endswith(" passed, 2 failed")
    assert "unheard_of" in bad.stdout
