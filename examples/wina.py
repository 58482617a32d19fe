"""Skip 40 % of the channels of every linear for each token: what it costs in perplexity, what it saves, and undoing it."""

import whatmatters as wm
from whatmatters.core import embedded

model, tokenizer = embedded.load()
text = wm.data.windows(tokenizer, embedded.documents("test")[:12], 256, per_document=1)
before = wm.evaluate(model, text)
for name in ("wina", "teal"):
    with getattr(wm.infer, name)(model, sparsity=0.4) as handle:
        after = wm.evaluate(model, text)  # whole windows: masked dense products, no faster than the dense model
        generate = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=24, do_sample=False)  # skips for real
    print(f"{name}: perplexity {before.perplexity:.2f} -> {after.perplexity:.2f}, {handle.costs()['reduction']:.0%} fewer multiplications")
assert wm.evaluate(model, text).perplexity == before.perplexity  # as it was, bit for bit
