"""A pruning method of one's own in a dozen lines, compared with FastV: `python examples/own_method.py`."""

from dataclasses import dataclass

import evengaze as eg
from evengaze.methods import resolve_keep


@eg.methods.register
@dataclass(frozen=True)
class MiddleOut(eg.Pruner):
    """Keep the tokens nearest to the middle of the picture, where photographers put things."""

    keep: float = 0.25
    name = "middle-out"

    def stages(self, layers):
        return [eg.Stage(layer=2, attention=None)]

    def score(self, view):
        height, width = view.tokens.images[0][0].grid  # of the first row's first picture
        row, column = view.tokens.cell // width, view.tokens.cell % width
        return -((row - (height - 1) / 2) ** 2 + (column - (width - 1) / 2) ** 2)

    def budget(self, stage, current, original):
        return resolve_keep(self.keep, original)


model, processor = eg.demo.load()
pictures = eg.demo.make_dataset("eval", images=8)
print(f"asking {sum(len(p.questions) for p in pictures)} questions of two methods, a minute or less", flush=True)
for pruner in (MiddleOut(), eg.FastV(keep=0.25)):
    right = total = 0
    with pruner(model) as run:
        for picture in pictures:
            for question in picture.questions:
                inputs = processor(images=picture.image, text=question.prompt, return_tensors="pt")
                output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
                answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right += answer.strip() == question.answer
                total += 1
            print(f"\r{pruner.name:12} {right} of {total} right", end="", flush=True)
    print(f"; {run.trace}")
