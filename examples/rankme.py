"""Which of two self-supervised runs uses more of its embedding? No labels are needed. Runs in a second."""

import torch

import whatmatters as wm

generator = torch.Generator().manual_seed(0)
healthy = torch.randn(4096, 64, generator=generator)
collapsed = torch.randn(4096, 4, generator=generator) @ torch.randn(4, 64, generator=generator) + 0.01 * healthy

ranks = {"healthy": wm.represent.rankme(healthy), "collapsed": wm.represent.rankme(collapsed)}
print(ranks, "-> keep", wm.represent.select_by_rankme(ranks))

# Streamed, for embeddings that do not fit in memory: the same value.
print(wm.represent.rankme(healthy.split(512)))
print(wm.represent.spectrum(collapsed).to_json())
