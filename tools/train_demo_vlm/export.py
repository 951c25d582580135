"""Writes the trained model as the folder that `evengaze.demo.load` reads."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from evengaze.demo.model import quantise
from evengaze.demo.scenes import PATCH, SIDE

from . import joint

# Line breaks are expressions because Jinja drops those that follow a block.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|im_start|>User:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ '\\n' + part['text'] }}{% endif %}{% endfor %}"
    "{% else %}{{ '\\nAssistant: ' + message['content'][0]['text'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
PREPROCESSOR = {
    "image_processor_type": "LlavaImageProcessor",
    "do_pad": True,
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_convert_rgb": True,
}
PROCESSOR = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "chat_template": CHAT_TEMPLATE,
}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def run(args: argparse.Namespace) -> None:
    """Quantise `joint.pt` and write it with its configuration, tokenizer and checksum."""
    work, out = Path(args.work), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model, _ = joint.make_model(work, args.seed)
    saved = torch.load(work / "joint.pt", weights_only=True)["model"]
    model.load_state_dict({name[2:]: value for name, value in saved.items() if name.startswith("0.")})
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    path = out / "model.safetensors"
    save_file(quantise(weights), path, metadata={"format": "pt"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / "model.safetensors.sha256").write_text(f"{digest}  model.safetensors\n", encoding="utf-8", newline="\n")
    config = json.loads(model.config.to_json_string(use_diff=True))
    write_json(out / "config.json", config | {"architectures": ["LlavaForConditionalGeneration"]})
    write_json(out / "preprocessor_config.json", PREPROCESSOR)
    write_json(out / "processor_config.json", PROCESSOR)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / "tokenizer" / name, out / name)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, sha256 {digest}")
