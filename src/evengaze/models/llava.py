"""LLaVA-1.5, Video-LLaVA and Mistral 3: one grid an image or frame, all of it placeholders in the prompt."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from evengaze.errors import LayoutError, UnsupportedModelError
from evengaze.layout import ImageInfo
from evengaze.models.base import Adapter, EncoderCall, VisionTower
from evengaze.models.border import padding_share
from evengaze.models.filled import Filled
from evengaze.models.loading import load_processor
from evengaze.models.pictures import Panel, Picture


class Llava(Filled):
    """LLaVA-1.5 (7B, 13B), also with a SigLIP or Pixtral tower."""

    name = "LLaVA-1.5"
    model_types = ("llava",)
    padding = (
        "border of the mean colour in the pixels; the checkpoints' own processor crops instead (`llava_processor`)"
    )

    def shown(self, config: Any, encoder: EncoderCall) -> list[Picture]:
        """One grid an image, from the size of the pixels; padding of the mean colour is found in them."""
        step, sizes = self.step(config), encoder.arguments.get("image_sizes")
        if sizes is not None:  # a Pixtral tower: pictures of any size in one batch, each read up to its own size
            return [Picture.still(Panel.plain(ImageInfo((int(h) // step, int(w) // step)))) for h, w in sizes]
        pixels: Tensor = encoder.arguments["pixel_values"]
        info = ImageInfo((pixels.shape[-2] // step, pixels.shape[-1] // step))
        special, shares = class_tokens(config), padding_share(pixels, info.grid)
        return [Picture.still(Panel.plain(info, share, special=special)) for share in shares]

    def step(self, config: Any) -> int:
        """Side of a visual token's square in pixels."""
        return patch_size(config)

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

    def shown(self, config: Any, encoder: EncoderCall) -> list[Picture]:
        """Images and videos; the class token that leads each frame is no candidate."""
        if encoder.kind == "image":
            return super().shown(config, encoder)
        videos: Tensor = encoder.arguments["pixel_values_videos"]
        step = self.step(config)
        info = ImageInfo((videos.shape[-2] // step, videos.shape[-1] // step), frames=videos.shape[1])
        return [Picture.video(Panel.plain(info, padding_share(video, info.grid), special=1)) for video in videos]

    def vision_tower(self, model: nn.Module, kind: Literal["image", "video"] = "image") -> VisionTower:
        """The image tower or the video tower; in both the class token comes first."""
        config: Any = model.config
        return feature_tower(getattr(model.base_model, f"{kind}_tower"), config, 1)


class Mistral3(Llava):
    """Mistral Small 3.1 and later, with a Pixtral tower. `[IMG_BREAK]` and `[IMG_END]` have ids of their own and stay.

    The grid is that of `image_sizes`: what the batch was padded to never becomes a token.
    """

    name = "Mistral 3"
    model_types = ("mistral3",)
    padding = "none: what a batch is padded to is cut off again (`image_sizes`)"
    mixes = "the patch merger joins groups of patches into one visual token"
    vision_tower = Adapter.vision_tower

    def step(self, config: Any) -> int:
        """The patch merger joins squares of patches."""
        return patch_size(config) * int(config.spatial_merge_size)


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
