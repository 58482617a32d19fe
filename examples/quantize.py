"""Mixed bits at an average of 3.5 by a layer score, rounded by RSQ, saved, and reloaded by transformers alone."""

import sys
import tempfile

from transformers import AutoModelForCausalLM

import whatmatters as wm
from whatmatters.core import embedded

output = sys.argv[1] if len(sys.argv) > 1 else f"{tempfile.mkdtemp()}/smaller"
model, tokenizer = embedded.load()
calibration = wm.data.calibration(tokenizer, embedded.documents("validation"), samples=16, length=256)
text = wm.data.windows(tokenizer, embedded.documents("test"), 256, per_document=1)

scores = wm.score.layer_shift(model, calibration)
bits = wm.allocate.bits(scores, average=3.5, levels=(2, 3, 4, 8))
before = wm.evaluate(model, text)
wm.quantize.rsq(model, calibration, bits=bits)
after = wm.evaluate(model, text)
saved = wm.save(model, tokenizer, output)
AutoModelForCausalLM.from_pretrained(output)
print(f"perplexity {before.perplexity:.2f} -> {after.perplexity:.2f}, {saved.weight_bytes / 1e6:.2f} MB in {output}")
