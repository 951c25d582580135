"""LLaVA-1.5 and its kin: one grid of patches an image, all of them placeholders in the prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evengaze.errors import LayoutError
from evengaze.layout import ImageInfo, VisualLayout
from evengaze.models.base import Adapter, Call
from evengaze.models.padding import MEAN_COLOUR, padding_share
from evengaze.models.pictures import Picture, assemble


class Llava(Adapter):
    """LLaVA-1.5 (7B, 13B), also with a SigLIP or Pixtral tower."""

    name = "LLaVA-1.5"
    model_types = ("llava",)

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """One grid an image, from the size of the pixels; padding of the mean colour is found in them."""
        config: Any = model.config
        special = class_tokens(config)
        pictures = []
        for encoder in call.encoded:
            pixels: Tensor = encoder.arguments["pixel_values"]
            sizes = encoder.arguments.get("image_sizes")
            patch = patch_size(config.vision_config)
            whole = tuple(pixels.shape[-2:])
            for k, image in enumerate(pixels.flatten(0, -4)):
                height, width = (int(s) for s in sizes[k]) if sizes is not None else whole
                grid = (height // patch, width // patch)
                share = padding_share(image[None, :, :height, :width], grid, MEAN_COLOUR)
                pictures.append(Picture.plain(ImageInfo(grid), padding=share, special=special))
        return assemble(call, {config.image_token_id: pictures})


def patch_size(vision: Any) -> int:
    """Side of a square patch in pixels."""
    size = vision.patch_size
    return int(size if isinstance(size, int) else size[0])


def class_tokens(config: Any) -> int:
    """Leading tokens of each image's features that show no patch: 1 if the tower's class token is passed on."""
    has_class = config.vision_config.model_type in ("clip_vision_model", "internvl_vision", "dinov2", "vit")
    return int(has_class and config.vision_feature_select_strategy == "full")


def llava_processor(source: Any, **kwargs: Any) -> Any:
    """A processor for LLaVA-1.5 that pads pictures to a square with the mean colour, as LLaVA's own code does.

    The processor files of the `llava-hf/llava-1.5-*` checkpoints resize the shorter edge and crop the centre, so that
    the sides of a wide picture are never seen; published numbers need the padding.

    Args:
        source: a hub id, a local folder, or a processor that has been loaded already (it is changed in place).
        kwargs: passed to `AutoProcessor.from_pretrained`.

    Returns:
        The processor; `processor.image_processor` is a `LlavaImageProcessor` with `do_pad=True`.

    Raises:
        LayoutError: the processor has no CLIP- or LLaVA-like image processor.
    """
    import transformers
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    processor = source if hasattr(source, "image_processor") else AutoProcessor.from_pretrained(source, **kwargs)
    old = processor.image_processor
    if not all(hasattr(old, name) for name in ("size", "crop_size", "image_mean", "image_std")):
        raise LayoutError(f"{type(old).__name__} is no CLIP-like image processor: llava_processor is for LLaVA-1.5")
    slow = type(old).__name__.endswith("Pil") or not is_torchvision_available()
    cls = getattr(transformers, "LlavaImageProcessorPil" if slow else "LlavaImageProcessor")
    values = {k: v for k, v in old.to_dict().items() if k not in ("image_processor_type", "processor_class", "do_pad")}
    processor.image_processor = cls(**values, do_pad=True)
    return processor
