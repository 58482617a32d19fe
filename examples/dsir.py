"""Fifty of four hundred documents, chosen because they look like a small target."""

import numpy as np

import whatmatters as wm

draw = np.random.default_rng(0)
sea, bank = ["ship", "sail", "wave", "storm", "harbour", "the", "a"], ["bond", "stock", "price", "share", "market", "the", "a"]
raw = [" ".join(draw.choice(sea if i % 5 == 0 else bank, 20)) for i in range(400)]
target = [" ".join(draw.choice(sea, 20)) for _ in range(60)]

dsir = wm.select.DSIR(min_tokens=10, temperature=30.0).fit(raw=raw, target=target)
chosen = dsir.select(50, seed=0)
for index, weight in list(zip(chosen.indices, chosen.log_weight, strict=True))[:5]:
    print(f"{index:3} {weight:+7.1f} {raw[index][:60]}")
right = np.mean(chosen.indices % 5 == 0)
print(f"{right:.0%} are about the sea, 20% of all are; KL reduction {chosen.kl_reduction:.3f} nats")
