"""Every error that evengaze raises on purpose, with one common base class; the core's warnings; and what others' errors
mean."""

from __future__ import annotations

_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
"""What allocators say: CUDA's, the CPU's, cuBLAS's, cuDNN's."""


class EvengazeError(Exception):
    """Base of all errors raised by evengaze."""


class ConfigError(EvengazeError, ValueError):
    """A parameter is out of range or parameters contradict each other."""


class LayoutError(EvengazeError, ValueError):
    """The visual tokens of a call could not be located, or a given layout does not fit the call."""


class LayoutWarning(UserWarning):
    """It cannot be known whether a call has visual tokens."""


class QuestionWarning(UserWarning):
    """Prompt and answer in one call do not give what generating the answer gives."""


class UnsupportedModelError(EvengazeError, TypeError):
    """No adapter matches the model, or the model cannot be pruned in principle."""


class NoAdapterError(UnsupportedModelError):
    """The model's family has visual tokens in its decoder, but no adapter that says where: one can be written."""


class AttachError(EvengazeError, RuntimeError):
    """A pruner is already attached, the model cannot be tapped, or a pruned cache is used without a pruner."""


class MissingExtraError(EvengazeError, ImportError):
    """A part is used whose packages are not installed; the message names the extra that brings them."""


class IncompatibleReleaseError(EvengazeError, RuntimeError):
    """Pruning does not work with the installed release of transformers."""


class ReleaseWarning(UserWarning):
    """The installed release of transformers is newer (or older) than any that evengaze was tested with."""


class NothingPrunedError(EvengazeError, RuntimeError):
    """A call contained visual tokens, but the attached pruner never got to prune them."""


class ScoreError(EvengazeError, RuntimeError):
    """A method produced scores that cannot be ranked (NaN, or of the wrong shape)."""


class CurveError(EvengazeError, ValueError):
    """A debias curve cannot be read, is malformed or does not fit."""


class DataError(EvengazeError, ValueError):
    """A dataset, predictions or results file is missing, malformed or does not belong together."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python's or PyTorch's says that memory ran out; few of the latter are `OutOfMemoryError`."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in said for sign in _NO_MEMORY)
    )
