"""Prune a plain decoder that is fed embeddings, by saying where they are: `python examples/bare_decoder.py`."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evengaze as eg
from evengaze.compat import cache_of

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=100)
model = LlamaForCausalLM(config).eval()
embeddings = torch.randn(2, 35 + 64 + 20, 64)  # two rows: a prefix, an 8 x 8 picture, a question

layout = eg.VisualLayout.from_spans([(35, 99), (35, 99)], grid=(8, 8))
with eg.FastV(keep=16, layer=2)(model, layout=layout) as run:
    mask = torch.ones(2, embeddings.shape[1], dtype=torch.long)
    output = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
print(run.trace)
print("cache entries by layer:", [layer.keys.shape[-2] for layer in cache_of(output).layers])
