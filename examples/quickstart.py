"""Answer questions with an eighth of the visual tokens, on the embedded model: `python examples/quickstart.py`."""

import evengaze as eg

model, processor = eg.demo.load()
picture = eg.demo.make_dataset("eval", images=1)[0]
pruner = eg.FastV(keep=0.125, layer=2, debias=eg.Debias(padding=eg.PaddingMask()))

for question in picture.questions:
    inputs = processor(images=picture.image, text=question.prompt, return_tensors="pt")
    with pruner(model) as run:
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{question.text:40} {answer:10} (right: {question.answer})")

print(run.trace)
run.trace.plot(picture.image).savefig("kept.png")
print("kept.png shows what was kept for the last question")
