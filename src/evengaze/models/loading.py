"""Loading checkpoints from outside: nobody's code is run, no pickle is read, and no weight is made up.

transformers asks on standard input whether to run a checkpoint's own code, reads pickles where there is nothing else,
and fills weights that a checkpoint lacks with random numbers and a log line. Here each of these is an error that names
the file or the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from evengaze.errors import ConfigError, DataError
from evengaze.extras import require
from evengaze.models.hub import ensure_reachable

T = TypeVar("T")

SAFE = (".safetensors", ".gguf")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LFS = b"version https://git-lfs"
_NAMED = 5


def load_config(source: str, *, revision: str | None = None, name: str | None = None) -> Any:
    """The config of a checkpoint.

    Args:
        source: hub id or local folder.
        revision: on the hub.
        name: what messages call the checkpoint; default: `source`.

    Raises:
        DataError: there is none, it is damaged, or it needs code of its own.
    """
    from transformers import AutoConfig

    ensure_reachable(source, revision=revision, name=name)
    return _guarded(
        source, name, lambda: AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    )


def load_processor(source: str, *, revision: str | None = None, name: str | None = None, **options: Any) -> Any:
    """The processor of a checkpoint; arguments and errors as in `load_config`, `options` of `from_pretrained`.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    from transformers import AutoProcessor

    ensure_reachable(source, revision=revision, name=name)
    options = {"trust_remote_code": False, "revision": revision, **options}
    return _guarded(source, name, lambda: AutoProcessor.from_pretrained(source, **options))


def load_tokenizer(source: str, *, revision: str | None = None, name: str | None = None) -> Any:
    """The tokenizer of a checkpoint; arguments and errors as in `load_processor`."""
    from transformers import AutoTokenizer

    ensure_reachable(source, revision=revision, name=name)
    return _guarded(
        source, name, lambda: AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    )


def load_model(
    auto: Any,
    source: str,
    *,
    revision: str | None = None,
    name: str | None = None,
    allow_missing: bool = False,
    **options: Any,
) -> tuple[Any, tuple[str, ...]]:
    """A model with all of its weights.

    Args:
        auto: one of transformers' auto classes.
        source: hub id or local folder.
        revision: on the hub.
        name: what messages call the checkpoint; default: `source`.
        allow_missing: let transformers fill weights that the checkpoint lacks with random numbers.
        options: of `from_pretrained`.

    Returns:
        The model, and the names of the weights that are random; none unless they were allowed.

    Raises:
        DataError: the checkpoint cannot be read, has pickles only, needs code of its own, or lacks weights.
        ConfigError: a package that it needs is not installed.
    """
    ensure_reachable(source, revision=revision, name=name)
    folder = Path(source)
    if folder.is_dir():
        _check_files(folder, name or source)
    model, info = _guarded(
        source,
        name,
        lambda: auto.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
            **options,
        ),
    )
    missing = _names(info.get("missing_keys", ()))
    wrong = _names(info.get("mismatched_keys", ()))
    if (missing or wrong) and not allow_missing:
        said = [f"{len(missing)} are missing ({_some(missing)})"] if missing else []
        said += [f"{len(wrong)} have another shape ({_some(wrong)})"] if wrong else []
        raise DataError(
            f"{name or source}: the checkpoint does not hold all weights of a {type(model).__name__}: "
            f"{' and '.join(said)}. They would be random numbers, and every answer with them. Fetch the checkpoint "
            "again, or allow it on purpose with allow_missing."
        )
    return model, (*missing, *wrong)


QUANTIZED = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True}}
"""Ways to quantise weights while they are loaded (bitsandbytes), by name."""


def quantization(name: str) -> Any:
    """The `quantization_config` of `from_pretrained` for one of `QUANTIZED`.

    A checkpoint that was quantised before (GPTQ, AWQ, FP8, ...) brings its own and needs none.

    Raises:
        ConfigError: there is no such way, or bitsandbytes is not installed.
    """
    if name not in QUANTIZED:
        raise ConfigError(
            f"quantize {name!r} does not exist; use {' or '.join(QUANTIZED)}. Checkpoints that were quantised before "
            "are loaded as they are, without it"
        )
    require("quantize", "quantising", "bitsandbytes", "accelerate")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**QUANTIZED[name])


def load_adapter(model: Any, source: str, *, name: str | None = None) -> None:
    """Put a LoRA (or another adapter of peft's) on top of a loaded model, in place.

    Args:
        model: the model.
        source: local folder or hub id with `adapter_config.json`.
        name: what messages call it; default: `source`.

    Raises:
        DataError: there is no such adapter, it is a pickle, or it does not fit the model.
        ConfigError: peft is not installed.
    """
    require("lora", "an adapter", "peft")
    what, folder = name or source, Path(source)
    if folder.is_dir():
        _check_files(folder, what)
        if not (folder / "adapter_config.json").is_file():
            raise DataError(f"{what}: the folder holds no adapter_config.json; give what peft's save_pretrained wrote")
    else:
        ensure_reachable(source, name=what, file="adapter_config.json")
    try:
        model.load_adapter(source, use_safetensors=True)
    except Exception as error:  # peft and safetensors raise whatever they stumble over
        raise DataError(f"{what}: this adapter cannot be put on {type(model).__name__} ({_line(error)})") from error


def _check_files(folder: Path, name: str) -> None:
    """Refuse pickles and Git LFS pointers by name, before transformers says something else about them."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    pickles = [path.name for path in files if path.suffix in PICKLES]
    if pickles and not any(path.suffix in SAFE for path in files):
        raise DataError(
            f"{name}: {', '.join(pickles[:_NAMED])} {'is a pickle' if len(pickles) == 1 else 'are pickles'}, which can "
            "run any code when read. Give the weights as safetensors: load them where you trust them, and write them "
            "with `model.save_pretrained(folder)`."
        )
    for path in files:
        with path.open("rb") as handle:
            if handle.read(len(_LFS)) == _LFS:
                raise DataError(
                    f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` where it was cloned."
                )


def _guarded(source: str, name: str | None, load: Callable[[], T]) -> T:
    """Call a loader of transformers; whatever it raises becomes one line that names the checkpoint."""
    what = name or source
    try:
        return load()
    except ImportError as error:
        raise ConfigError(f"{what}: it needs a package that is not installed: {_line(error)}") from error
    except Exception as error:  # damaged files end in errors of json, tokenizers, safetensors, dataclasses, ...
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{what}: this checkpoint brings Python code of its own (auto_map in its config.json), which evengaze "
                "does not run. Use a checkpoint of a family that transformers has, see `evengaze list models`."
            ) from error
        where = "folder" if Path(source).exists() else "hub id or folder"
        raise DataError(
            f"{what}: this {where} cannot be loaded ({_line(error)}). Give a folder with config.json, weights as "
            "safetensors and processor files, a hub id, or 'demo' for the embedded model."
        ) from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (OSError, ValueError, ImportError)) and text else f"{type(error).__name__}: {text}"


def _names(keys: Iterable[Any]) -> tuple[str, ...]:
    """Names of weights; some releases give them together with both shapes."""
    return tuple(sorted(key if isinstance(key, str) else str(key[0]) for key in keys))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
