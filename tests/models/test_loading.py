"""Checkpoints from outside: no code of theirs runs, no pickle is read, and no weight is random without a word."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from evengaze.errors import DataError, EvengazeError
from evengaze.evaluate.judge import LocalJudge
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.models.loading import load_config, load_model, load_processor
from runner_fakes import save_model, save_pope

UP = "language_model.model.layers.0.mlp.up_proj.weight"
LOADED = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def rewrite(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage(folder: Path, how: str) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[UP] = weights[UP][:3].clone()

    rewrite(folder, change if how == "mismatched" else lambda weights: weights.pop(UP))


@pytest.mark.parametrize("how", ["missing", "mismatched"])
def test_a_checkpoint_that_lacks_weights_is_an_error_that_names_them(folder: Path, how: str) -> None:
    damage(folder, how)
    with pytest.raises(DataError) as caught:
        Predictor.load(ModelSpec(str(folder), device="cpu"))
    assert LOADED in str(caught.value)
    assert "on purpose with allow_missing" in str(caught.value)


def test_random_weights_that_were_allowed_are_part_of_the_fingerprint(folder: Path, sound: Path) -> None:
    damage(folder, "missing")
    allowed = Predictor.load(ModelSpec(str(folder), device="cpu", allow_missing=True))
    assert allowed.describe()["missing_weights"] == [LOADED]
    assert Predictor.load(ModelSpec(str(sound), device="cpu")).describe()["missing_weights"] == []


def test_a_judge_that_lacks_weights_is_refused_too(tmp_path: Path) -> None:
    from evengaze.testing import tiny

    model, _ = tiny("llava")
    language = tmp_path / "judge"
    model.config.text_config.save_pretrained(language)
    from transformers import LlamaForCausalLM

    text = LlamaForCausalLM(model.config.text_config)
    text.save_pretrained(language)
    tokenizer = load_processor(str(save_model(tmp_path / "vlm"))).tokenizer
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(language)
    assert LocalJudge(str(language), device="cpu").describe()["kind"] == "transformers"
    rewrite(language, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(DataError, match=r"judge .*model\.layers\.0\.mlp\.up_proj\.weight"):
        LocalJudge(str(language), device="cpu")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused_by_name_before_they_are_opened(folder: Path, suffix: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / f"pytorch_model{suffix}").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(DataError, match=rf"pytorch_model\{suffix} is a pickle"):
        load_model(AutoModelForImageTextToText, str(folder))


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    assert load_model(AutoModelForImageTextToText, str(folder))[1] == ()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 64, b"{", b"[]", b"null", b'{"a": 1}', b"version https://git-lfs.github.com/spec/v1\nsize 9\n"],
)
def test_damaged_files_are_one_error_that_names_the_checkpoint(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    try:
        Predictor.load(ModelSpec(str(folder), device="cpu"))
    except EvengazeError as error:
        assert str(folder) in str(error)
    else:  # some fields of the processor's file may be absent
        assert name == "processor_config.json"


def test_truncated_weights_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(AutoModelForImageTextToText, str(folder))


def test_lfs_pointers_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"model\.safetensors is a Git LFS pointer"):
        load_model(AutoModelForImageTextToText, str(folder))


EVIL = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"
AUTO_MAP = {
    "config.json": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"},
    "processor_config.json": {"AutoProcessor": "evil.Processor", "AutoImageProcessor": "evil.ImageProcessor"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", None]},
}


@pytest.mark.slow
@pytest.mark.parametrize("own_type", [False, True], ids=["known type", "type of its own"])
def test_a_checkpoints_own_code_never_runs_even_if_standard_input_says_yes(
    folder: Path, tmp_path: Path, own_type: bool
) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL.format(marker=str(marker)))
    for name, auto_map in AUTO_MAP.items():
        values = json.loads((folder / name).read_text())
        values["auto_map"] = auto_map
        if own_type and name == "config.json":
            values["model_type"] = "evil"
        (folder / name).write_text(json.dumps(values))
    code = (
        "import sys\nfrom evengaze.cli import main\nsource = sys.argv[1]\n"
        "for arguments in (['doctor', source], ['profile', '--model', source, '--rounds', '1', '--device', 'cpu'],\n"
        "                  ['score', 'mmvet', '--answers', 'x', '--data', 'y', '--judge-local', source]):\n"
        "    try:\n        main(arguments)\n    except SystemExit as end:\n        print('status', end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        input="y\n" * 100,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert not marker.exists(), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    if own_type:
        assert done.stdout.count("status 2") == 3
        assert "does not run" in done.stderr


def test_a_family_of_its_own_is_named_with_the_reason(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="Python code of its own"):
        load_config(str(folder))


def test_no_place_in_the_library_loads_on_its_own() -> None:
    """`from_pretrained` of the auto classes stands in one file, so that its checks hold everywhere."""
    import evengaze

    root = Path(evengaze.__file__).parent
    calls = ("AutoConfig.from_pretrained(", "AutoProcessor.from_pretrained(", "AutoTokenizer.from_pretrained(")
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if any(call in path.read_text() for call in (*calls, "torch.load(", "AutoModelForImageTextToText.from"))
    }
    assert found == {"models/loading.py"}


def test_the_command_line_says_it_and_lets_it_pass_on_purpose(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evengaze.cli import main

    damage(folder, "missing")
    save_pope(tmp_path / "data", images=1)
    given = ["evaluate", "--model", str(folder), "--benchmarks", "pope", "--data", str(tmp_path / "data")]
    given += ["--max-new-tokens", "2", "--device", "cpu", "--out"]
    with pytest.raises(SystemExit) as end:
        main([*given, str(tmp_path / "refused")])
    assert end.value.code == 2
    assert LOADED in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([*given, str(tmp_path / "allowed"), "--allow-missing"])
    assert end.value.code == 0
    (stamp,) = (tmp_path / "allowed").rglob("fingerprint.json")
    assert json.loads(stamp.read_text())["model"]["missing_weights"] == [LOADED]
