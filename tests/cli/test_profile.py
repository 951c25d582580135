"""`evengaze profile`: from a config alone, every value checked before anything is built, no line too wide."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from evengaze.cli import main
from evengaze.testing import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    tiny("llava")[0].config.save_pretrained(folder)
    return folder / "config.json"


def call(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_a_config_alone_is_enough(config: Path, tmp_path: Path, capsys: Any) -> None:
    table, figure = tmp_path / "a.csv", tmp_path / "a.svg"
    arguments = ["profile", "--config", config, "-m", "fastv:keep=4;dense", "--visual-tokens", 40, "--text-tokens", 12]
    arguments += ["--new-tokens", 3, "--batch", "1,2", "--rounds", 2, "--static", "--csv", table, "--plot", figure]
    code, out, _ = call(capsys, *arguments, "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 12 and {row["batch"] for row in rows} == {1, 2}
    assert [row["method"] for row in rows[:3]] == ["dense", "fastv:keep=4", "dense (attached)"]
    assert all(row["random_weights"] and row["visual_tokens"] == 32 and row["text_tokens"] == 12 for row in rows)
    assert all(row["verdict"].endswith(".") and row["pictures"] == "2 pictures of 56 x 56 pixels" for row in rows)
    with table.open() as handle:
        read = list(csv.DictReader(handle))
    assert [row["verdict"] for row in read] == [row["verdict"] for row in rows] and set(read[0]) == set(rows[0])
    assert figure.read_text().lstrip().startswith("<?xml")


def test_the_folder_of_a_config_is_a_model_without_weights(config: Path, capsys: Any) -> None:
    arguments = ["profile", "--model", config.parent, "-m", "fastv:keep=4", "--new-tokens", 0, "--rounds", 1]
    code, out, err = call(capsys, *arguments)
    assert code == 0 and "random weights" in " ".join(out.split()) and "has no weights: random ones are used" in err
    assert "prefill" in out and "memory" in out and "decoding" not in out and "Percentages are shares" in err


LONG = "pyramiddrop:keep=[0.75,0.5,0.25],layers=[2,3,4],debias=padding"


def test_nothing_is_wider_than_eighty_columns_and_no_name_is_cut(
    config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["profile", "--config", config, "-m", f"{LONG};fastv:keep=4", "--new-tokens", 2, "--rounds", 5]
    code, out, _ = call(capsys, *arguments)
    path = str(config)
    lines = [line for line in out.splitlines() if path not in line]
    assert code == 0 and max(map(len, lines)) <= 80
    assert lines.count(LONG) == 2 and f"{LONG}: " in out.replace("\n", " ")


BAD = {
    "--batch 0": "give whole numbers from 1 on",
    "--batch 1,x": "give whole numbers from 1 on",
    "--methods fastvv": "Did you mean 'fastv'?",
    "--methods fastv:layer=9": "outside the model",
    "--visual-tokens 0": "greater than or equal to 1",
    "--text-tokens 1": "greater than or equal to 2",
    "--new-tokens -1": "greater than or equal to 0",
    "--rounds 0": "greater than or equal to 1",
    "--graphs --device cpu": "--graphs captures CUDA graphs",
    "--dtype float12": "dtype 'float12' does not exist",
    "--device nowhere": "device 'nowhere' cannot be used",
    "--csv figures.txt": "give a file that ends in .csv",
    "--plot figure.jpg": "give a file that ends in",
    "--plot no/such/folder/a.png": "does not exist; make the folder first",
    "--image a.png": "--image needs a checkpoint",
    "--prompt what?": "--prompt needs a checkpoint",
    "--prompt what? --text-tokens 8": "cannot both be given",
    "--adapter here": "--adapter is for checkpoints",
    "--quantize 4bit": "--quantize is for checkpoints",
    "--allow-missing": "--allow-missing is for checkpoints",
    "--device balanced": "random weights are made on one device",
    "--model other": "cannot both be given",
}


@pytest.mark.parametrize("wrong", list(BAD))
def test_every_value_is_checked_before_anything_is_built(
    config: Path, wrong: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evengaze.profile.build.random_model", lambda *a, **k: pytest.fail("a model was built"))
    code, out, err = call(capsys, "profile", "--config", config, *wrong.split())
    said = " ".join(err.replace("│", " ").split())
    assert code == 2 and not out and BAD[wrong] in said


def test_a_config_that_is_not_there_names_the_shapes(capsys: Any) -> None:
    code, _, err = call(capsys, "profile", "--config", "nothing-there")
    assert code == 2 and "--config nothing-there" in err and "llava-1.5-7b" in err and len(err.splitlines()) == 1


def test_plan_knows_the_shapes(capsys: Any) -> None:
    code, out, _ = call(capsys, "plan", "--model", "qwen2.5-vl-7b", "--visual-tokens", 1024, "--json")
    found = json.loads(out)
    assert code == 0 and found["layers"] == 28 and found["visual"] == 1024
    assert found["methods"][0]["kv_bytes"] == 28 * 2 * 4 * 128 * (1024 + 64) * 2


def test_a_checkpoint_takes_its_own_picture_or_made_up_ones(tiny_folder: Path, picture: Path, capsys: Any) -> None:
    arguments = ["profile", "--model", tiny_folder, "-m", "fastv:keep=4", "--rounds", 1, "--new-tokens", 0, "--json"]
    code, out, _ = call(capsys, *arguments, "-i", picture, "--batch", "1,2")
    rows = json.loads(out)
    assert code == 0 and not rows[0]["random_weights"] and [row["visual_tokens"] for row in rows] == [16] * 4
    assert rows[2]["kv_bytes"] == 2 * rows[0]["kv_bytes"] and rows[3]["kv_bytes"] == 2 * rows[1]["kv_bytes"]
    code, out, _ = call(capsys, *arguments, "--visual-tokens", 48, "--text-tokens", 9)
    rows = json.loads(out)
    assert code == 0 and rows[0]["visual_tokens"] == 48 and rows[0]["text_tokens"] == 9
    assert rows[0]["pictures"] == "3 pictures of 56 x 56 pixels"
