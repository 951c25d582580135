"""Pictures of every kind look as viewers show them, or, on request, as LLaVA's scripts make them; contents count."""

from __future__ import annotations

import json
import os
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks import Record, get_benchmark
from evengaze.evaluate.media import as_rgb, media_digest, open_media, read_media
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.evaluate.runner import Job, LocalBackend, run
from evengaze.evaluate.setting import Setting
from evengaze.methods import parse
from runner_fakes import save_model, save_pope

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
GREY = np.round(RAMP * 255).astype(np.uint8)


def encoded(picture: Image.Image, kind: str, **options: Any) -> Path | bytes:
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def shown(content: Path | bytes, *, official: bool = False) -> np.ndarray:
    picture = open_media(Record("a", "a", "?", image=content), official=official)[1]
    assert picture.mode == "RGB"
    return np.asarray(picture)[..., 0]


def sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.round(RAMP * 65535).astype(np.uint16)), "PNG")


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        (sixteen_bits(), 1),
        (encoded(Image.fromarray(np.round(RAMP * 65535).astype(np.uint16)), "TIFF"), 1),
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), 1),
        (encoded(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"), 1),
        (encoded(Image.fromarray((RAMP * 1e6 - 3e5).astype(np.float32)), "TIFF"), 1),
        (encoded(Image.fromarray(np.round(RAMP * 65535).astype(np.int32)), "TIFF"), 1),
        (encoded(Image.fromarray(np.round(RAMP * 1e9).astype(np.int32)), "TIFF"), 1),
        (encoded(Image.fromarray(GREY.astype(np.uint16)), "PNG"), 0),
        (encoded(Image.fromarray(GREY), "PNG"), 0),
        (encoded(Image.fromarray(GREY).convert("P"), "PNG"), 0),
    ],
    ids=["png16", "tiff16", "unit", "float255", "signed", "int32", "large", "eight in sixteen", "grey", "palette"],
)
def test_every_value_range_is_shown_whole(content: bytes, tolerance: int) -> None:
    assert np.abs(shown(content).astype(int) - GREY).max() <= tolerance


def test_what_is_no_number_is_black_and_one_value_is_no_error() -> None:
    holes = RAMP.astype(np.float32)
    holes[0, 0] = holes[5, 5] = np.nan
    assert np.abs(shown(encoded(Image.fromarray(holes), "TIFF")).astype(int) - GREY).max() <= 21
    for value in (0.0, -3.0, 1e9, np.nan):
        shown(encoded(Image.fromarray(np.full((9, 5), value, np.float32)), "TIFF"))


def black_on_nothing(mode: str) -> Image.Image:
    """A black square on transparent ground that hides black: black on black without its alpha."""
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (5, 5, 15, 15))
    if mode == "P":
        made = Image.new("P", (20, 20), 0)
        made.putpalette([0, 0, 0, 0, 0, 0])
        made.paste(1, (5, 5, 15, 15))
        return made
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_ground_is_white_as_in_viewers_and_hidden_colour_in_official_mode(mode: str) -> None:
    content = encoded(black_on_nothing(mode), "PNG", **({"transparency": 0} if mode == "P" else {}))
    assert (shown(content)[0, 0], shown(content)[10, 10]) == (255, 0)
    assert set(np.unique(shown(content, official=True))) == {0}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_that_a_camera_noted_is_applied_by_default_only(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.new("RGB", (30, 20), "red"), "JPEG", exif=exif)
    turned = orientation >= 5
    assert shown(content).shape == ((30, 20) if turned else (20, 30))
    assert shown(content, official=True).shape == (20, 30)
    assert read_media(Record("a", "a", "?", image=content)).differs == (orientation > 1)


@pytest.mark.parametrize("content", [sixteen_bits(), encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF")])
def test_official_mode_keeps_the_official_conversion(content: bytes) -> None:
    with Image.open(BytesIO(content)) as picture:
        assert np.array_equal(shown(content, official=True), np.asarray(picture.convert("RGB"))[..., 0])
    assert read_media(Record("a", "a", "?", image=content)).differs


def test_plain_pictures_are_equal_in_both_modes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for mode in ("RGB", "L", "CMYK", "YCbCr", "1"):
        picture = Image.fromarray(noise).convert(mode)
        assert np.array_equal(np.asarray(as_rgb(picture)), np.asarray(picture.convert("RGB")))


# -- the run knows which picture it was --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def answer(model: Path, data: Path, out: Path, **spec: Any) -> Any:
    backend = LocalBackend(Predictor.load(ModelSpec(str(model), device="cpu", **spec)))
    return run(Job(get_benchmark("pope"), data, parse("fastv:keep=4"), out, Setting(max_new_tokens=2)), backend)


def pictures(data: Path) -> list[Path]:
    return sorted((data / "playground/data/eval/pope/val2014").iterdir())


def test_official_prompts_convert_officially_and_say_so(model: Path, tmp_path: Path) -> None:
    from evengaze.evaluate.runner import picture_notes

    data = save_pope(tmp_path / "data", images=2)
    pictures(data)[0].write_bytes(sixteen_bits())
    usual, official = answer(model, data, tmp_path / "a"), answer(model, data, tmp_path / "b", prompt="official")
    assert usual.fingerprint["model"]["pictures"] == "as viewers show them"
    assert official.fingerprint["model"]["pictures"] == "as LLaVA's scripts convert them"
    assert picture_notes(usual) == []
    assert "3 of 6 answers are about pictures that LLaVA's scripts convert otherwise" in picture_notes(official)[0]


@pytest.mark.parametrize("where", ["all of it", "one bit in the middle", "the last byte", "same size"])
def test_another_picture_under_the_same_name_is_noticed(model: Path, tmp_path: Path, where: str) -> None:
    data = save_pope(tmp_path / "data", images=2)
    answer(model, data, tmp_path / "out")
    target = pictures(data)[1]
    raw, state = bytearray(target.read_bytes()), target.stat()
    if where == "all of it":
        Image.new("RGB", (50, 50), "red").save(target)
    else:
        place = {"one bit in the middle": len(raw) // 2, "the last byte": -1, "same size": 100}[where]
        raw[place] ^= 1
        target.write_bytes(raw)
        os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"3 answers about pictures or videos whose content is another one now"):
        answer(model, data, tmp_path / "out")


def test_other_names_and_a_moved_data_folder(model: Path, tmp_path: Path) -> None:
    data = save_pope(tmp_path / "data", images=2)
    before = answer(model, data, tmp_path / "out").answers
    moved = Path(shutil.move(data, tmp_path / "moved"))
    assert answer(model, moved / "playground", tmp_path / "out").answers == before
    questions = moved / "playground/data/eval/pope/llava_pope_test.jsonl"
    one, other = (path.name for path in pictures(moved))
    questions.write_text(questions.read_text().replace(one, "@@").replace(other, one).replace("@@", other))
    with pytest.raises(DataError, match=r"benchmark\.hash"):
        answer(model, moved, tmp_path / "out")


def test_a_fingerprint_that_was_deleted_or_replaced_is_not_adopted(model: Path, tmp_path: Path) -> None:
    data = save_pope(tmp_path / "data", images=2)
    answer(model, data, tmp_path / "out")
    stamp = tmp_path / "out" / "fingerprint.json"
    kept = stamp.read_text()
    stamp.unlink()
    with pytest.raises(DataError, match=r"holds answers, but no fingerprint\.json"):
        answer(model, data, tmp_path / "out")
    stamp.write_text(kept)
    assert len(answer(model, data, tmp_path / "out").answers) == 6
    for line in (tmp_path / "out" / "shards").glob("answers-*.jsonl"):
        rows = [json.loads(text) for text in line.read_text().splitlines()]
        rows[0]["answer_id"] = "f" * 22
        line.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"1 answers that do not belong to its fingerprint\.json"):
        answer(model, data, tmp_path / "out")


def test_a_picture_that_is_gone_does_not_lose_its_answer(model: Path, tmp_path: Path) -> None:
    data = save_pope(tmp_path / "data", images=2)
    before = answer(model, data, tmp_path / "out").answers
    pictures(data)[0].unlink()
    assert answer(model, data, tmp_path / "out").answers == before


def test_large_files_are_told_apart_by_size_beginning_middle_and_end(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    raw = bytearray(np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes())
    marks = set()
    for place in (None, 0, 1 << 19, -1):
        if place is not None:
            raw[place] ^= 1
        path.write_bytes(raw)
        os.utime(path, ns=(0, len(marks) + 1))
        marks.add(media_digest(Record("a", 0, "?", image=path)))
    path.write_bytes(raw + b"\0")
    marks.add(media_digest(Record("a", 0, "?", video=path)))
    assert len(marks) == 5
    assert media_digest(Record("a", 0, "?", image=tmp_path / "gone")) is None
