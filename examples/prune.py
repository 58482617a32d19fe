"""Half of the weights gone: by magnitude, by Wanda, and by any scorer's mask."""

import copy

import whatmatters as wm
from whatmatters.core import embedded

model, tokenizer = embedded.load()
calibration = wm.data.calibration(tokenizer, embedded.documents("validation"), samples=16, length=256)
text = wm.data.windows(tokenizer, embedded.documents("test"), 256, per_document=1)
print(f"dense {wm.evaluate(model, text).perplexity:.2f}")

for prune in (wm.prune.magnitude, wm.prune.wanda, wm.prune.sparsegpt):
    pruned = copy.deepcopy(model)
    prune(pruned, calibration, sparsity=0.5)
    print(f"{prune.__name__} {wm.evaluate(pruned, text).perplexity:.2f}")

mask = wm.allocate.masks(wm.score.gradient(model, calibration, unit="weight"), 0.5, scope="row")
pruned = copy.deepcopy(model)
wm.prune.apply(pruned, mask)
print(f"gradient mask {wm.evaluate(pruned, text).perplexity:.2f}")
