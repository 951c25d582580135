"""LLaVA-1.5 and Video-LLaVA: one grid of patches an image or frame, all of them placeholders in the prompt."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from evengaze.errors import LayoutError, UnsupportedModelError
from evengaze.layout import ImageInfo, VisualLayout
from evengaze.models.base import Adapter, Call, EncoderCall, VisionTower
from evengaze.models.border import MEAN_COLOUR, padding_share
from evengaze.models.loading import load_processor
from evengaze.models.pictures import Panel, Picture, assemble


class Llava(Adapter):
    """LLaVA-1.5 (7B, 13B), also with a SigLIP or Pixtral tower."""

    name = "LLaVA-1.5"
    model_types = ("llava",)
    padding = (
        "border of the mean colour in the pixels; the checkpoints' own processor crops instead (`llava_processor`)"
    )

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """One grid an image, from the size of the pixels; padding of the mean colour is found in them."""
        config: Any = model.config
        pictures = [p for encoder in call.encoded for p in self._images(config, encoder)]
        return assemble(call, {config.image_token_id: pictures})

    def _images(self, config: Any, encoder: EncoderCall) -> list[Picture]:
        pixels: Tensor = encoder.arguments["pixel_values"]
        patch, special = patch_size(config), class_tokens(config)
        sizes = encoder.arguments.get("image_sizes")
        if sizes is None:
            grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
            shares = list(padding_share(pixels, grid, MEAN_COLOUR))
        else:  # a Pixtral tower: pictures of any size in one batch; each is read up to its own size, without padding
            shares = [pixels.new_zeros(int(h) // patch, int(w) // patch).cpu() for h, w in sizes]
        return [Picture.still(Panel.plain(ImageInfo(_shape(s)), s, special=special)) for s in shares]

    def vision_tower(self, model: nn.Module, kind: Literal["image", "video"] = "image") -> VisionTower:
        """The CLIP or SigLIP tower."""
        config: Any = model.config
        if config.vision_config.model_type == "pixtral":
            raise UnsupportedModelError(f"{self.name}: a Pixtral tower packs all images into one sequence")
        return feature_tower(getattr(model.base_model, "vision_tower"), config, class_tokens(config))  # noqa: B009


class VideoLlava(Llava):
    """Video-LLaVA: images as in LLaVA-1.5; each frame of a video comes with its class token."""

    name = "Video-LLaVA"
    model_types = ("video_llava",)
    padding = "border of the mean colour in the pixels; the processor itself resizes and crops"

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """Images and videos; the class token that leads each frame is no candidate."""
        config: Any = model.config
        patch = patch_size(config)
        images: list[Picture] = []
        videos: list[Picture] = []
        for encoder in call.encoded:
            if encoder.kind == "image":
                images += self._images(config, encoder)
                continue
            for video in encoder.arguments["pixel_values_videos"]:
                grid = (video.shape[-2] // patch, video.shape[-1] // patch)
                info = ImageInfo(grid, frames=len(video))
                videos.append(Picture.video(Panel.plain(info, padding_share(video, grid, MEAN_COLOUR), special=1)))
        return assemble(call, {config.image_token_id: images, config.video_token_id: videos})

    def vision_tower(self, model: nn.Module, kind: Literal["image", "video"] = "image") -> VisionTower:
        """The image tower or the video tower; in both the class token comes first."""
        config: Any = model.config
        return feature_tower(getattr(model.base_model, f"{kind}_tower"), config, 1)


def patch_size(config: Any) -> int:
    """Side of a square patch in pixels."""
    size = config.vision_config.patch_size
    return int(size if isinstance(size, int) else size[0])


def class_tokens(config: Any) -> int:
    """Leading placeholders of each image that show no patch: 1 if the tower's class token is passed on."""
    has_class = config.vision_config.model_type in ("clip_vision_model", "internvl_vision", "vit")
    return int(has_class and config.vision_feature_select_strategy == "full")


def feature_tower(tower: Any, config: Any, special: int) -> VisionTower:
    """A CLIP-like tower whose hidden states at `config.vision_feature_layer` are the features.

    Raises:
        UnsupportedModelError: features of several layers are joined.
    """
    layers: nn.ModuleList = getattr(tower, "vision_model", tower).encoder.layers
    chosen = getattr(config, "vision_feature_layer", -1)
    if not isinstance(chosen, int):
        raise UnsupportedModelError(f"{config.model_type}: features of several layers {chosen} are joined")
    special = max(special, int(config.vision_config.model_type == "clip_vision_model"))
    return VisionTower(tower, layers, special, chosen if chosen >= 0 else len(layers) + 1 + chosen)


def llava_processor(source: Any, **kwargs: Any) -> Any:
    """A processor for LLaVA-1.5 that pads pictures to a square with the mean colour, as LLaVA's own code does.

    The processor files of the `llava-hf/llava-1.5-*` checkpoints resize the shorter edge and crop the centre, so that
    the sides of a wide picture are never seen; published numbers need the padding.

    Args:
        source: a hub id, a local folder, or a processor that has been loaded already (it is changed in place).
        kwargs: passed to `AutoProcessor.from_pretrained`; a checkpoint's own code is not run unless they say so.

    Returns:
        The processor; its `image_processor` is a `LlavaImageProcessor` (or its Pil variant) with `do_pad=True`.

    Raises:
        LayoutError: the processor has no CLIP- or LLaVA-like image processor.
    """
    import transformers
    from transformers.utils import is_torchvision_available

    processor = source if hasattr(source, "image_processor") else load_processor(source, **kwargs)
    old = processor.image_processor
    if not all(hasattr(old, name) for name in ("size", "crop_size", "image_mean", "image_std")):
        raise LayoutError(f"{type(old).__name__} is no CLIP-like image processor: llava_processor is for LLaVA-1.5")
    slow = type(old).__name__.endswith("Pil") or not is_torchvision_available()
    cls = getattr(transformers, "LlavaImageProcessorPil" if slow else "LlavaImageProcessor")
    values = {k: v for k, v in old.to_dict().items() if k not in ("image_processor_type", "processor_class", "do_pad")}
    processor.image_processor = cls(**values, do_pad=True)
    return processor


def _shape(share: Tensor) -> tuple[int, int]:
    return (share.shape[0], share.shape[1])
