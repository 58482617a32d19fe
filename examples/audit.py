"""Which importance score tells the truth about this model? Runs on the embedded model in a few minutes."""

import whatmatters as wm
from whatmatters.core import embedded

model, tokenizer = embedded.load()
calibration = wm.data.calibration(tokenizer, embedded.documents("validation"), samples=16, length=256)
text = wm.data.windows(tokenizer, embedded.documents("test"), 256, per_document=1)
audit = wm.score.audit(model, calibration, text, scorers=["layer-shift", "magnitude", "gradient", "random"])
print(audit.verdict)
for row in audit.rows:
    print(f"{row.scorer:16} rank correlation with measured damage {row.spearman:+.2f}")
