"""Kill one evaluation with SIGKILL again and again, let it go on each time, and compare with an undisturbed one.

    python benchmarks/kill_resume.py                        # 20 kills on the embedded model
    python benchmarks/kill_resume.py --model DIR --data DIR --benchmark pope --kills 50

Every attempt is the same command. It is killed after a random number of new answers and a random wait, some attempts
before they have answered anything. In the end the merged answers must be equal byte for byte to those of a run that was
left alone, and no record may stand twice in the shards. The last line says so; the exit status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = [sys.executable, "-c", "from evengaze.cli import main; main()"]


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    command = [*RUN, "evaluate", "--model", options.model, "--benchmarks", options.benchmark]
    command += ["--data", str(options.data), "--out", str(out), "--methods", options.method, "--baselines", ""]
    command += ["--batch-size", str(options.batch_size), "--limit", str(options.limit)]
    command += ["--max-new-tokens", str(options.max_new_tokens), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def finish(options: argparse.Namespace, out: Path) -> None:
    process = start(options, out)
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"the evaluation failed with status {process.returncode}:\n{said.decode(errors='replace')[-2000:]}")


def size(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("answers-*.jsonl"))


def lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.rglob("answers-*.jsonl"))


def kill_once(options: argparse.Namespace, out: Path, draw: random.Random, share: int) -> bool:
    """One attempt; False if it came to its end before it was killed."""
    before, process = lines(out), start(options, out)
    # Every fourth attempt or so dies while it still starts, loads or checks.
    wanted = 0 if draw.random() < 0.25 else draw.randint(1, share)
    wait = draw.random() * options.start if wanted == 0 else draw.random() * options.spread
    while process.poll() is None and lines(out) < before + wanted:
        time.sleep(0.005)
    time.sleep(wait)
    if process.poll() is not None:
        process.communicate()
        return False
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, help="default: the embedded evaluation set")
    parser.add_argument("--benchmark", default="questions")
    parser.add_argument("--method", default="fastv:keep=49,layer=2")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=300, help="questions")
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--spread", type=float, default=0.5, help="seconds to wait at most after enough answers")
    parser.add_argument("--start", type=float, default=15.0, help="seconds within which attempts die early")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.data is None:
            from evengaze import demo

            options.data = root / "data"
            demo.write_dataset(options.data)
        began = time.monotonic()
        finish(options, root / "alone")
        total = lines(root / "alone")
        print(f"undisturbed: {total} answers in {time.monotonic() - began:.0f} s", flush=True)
        torn = early = 0
        # Each attempt gets a share of the answers such that about half of them are left for the last ones.
        share = max(1, total // options.kills)
        for kill in range(1, options.kills + 1):
            before = size(root / "killed")
            if not kill_once(options, root / "killed", draw, share):
                print(f"the evaluation ended before kill {kill}; give a larger --limit")
                return 1
            files = list((root / "killed").rglob("answers-*.jsonl"))
            torn += any(path.stat().st_size and not path.read_bytes().endswith(b"\n") for path in files)
            early += size(root / "killed") == before
            print(f"kill {kill:2}: {lines(root / 'killed')} answers on disk", flush=True)
        finish(options, root / "killed")
        expected, found = (
            {path.parent.name: path.read_bytes() for path in (root / name).rglob("answers.jsonl")}
            for name in ("alone", "killed")
        )
        keys = [
            (path.parent, json.loads(line)["metadata"]["key"])
            for path in (root / "killed").rglob("answers-*.jsonl")
            for line in path.read_text().splitlines()
        ]
    print(f"{options.kills} kills; {early} before any new answer; {torn} left a torn last line")
    twice = len(keys) - len(set(keys))
    equal = expected == found and bool(expected)
    lost = total - len(set(keys))
    print(f"{len(keys)} answers, {twice} twice, {lost} lost; merged files {'equal' if equal else 'DIFFER'}")
    return 0 if equal and not twice and not lost else 1


if __name__ == "__main__":
    sys.exit(main())
