"""Adapters: what the engine must know about each model family."""

from evengaze.models.base import Adapter, Call, EncoderCall, find_decoder
from evengaze.models.llava import llava_processor
from evengaze.models.pictures import Panel, Picture, assemble
from evengaze.models.registry import BUILT_IN, BareDecoder, adapter_for, adapter_for_type, register

__all__ = [
    "BUILT_IN",
    "Adapter",
    "BareDecoder",
    "Call",
    "EncoderCall",
    "Panel",
    "Picture",
    "adapter_for",
    "adapter_for_type",
    "assemble",
    "find_decoder",
    "llava_processor",
    "register",
]
