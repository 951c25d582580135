"""Tiny random models of every supported family, for tests that need no download.

>>> model, inputs = tiny("llava", batch=3)
>>> model.generate(**inputs, max_new_tokens=8, do_sample=False)

The weights are seeded parameter by parameter and large enough that greedy tokens are decided by clear margins; the
prompts of a batch differ in length and text.
"""

from evengaze.testing.models import families, layout_of, tiny

__all__ = ["families", "layout_of", "tiny"]
