"""Tune the embedded model on a little text, two of its six layers at a time. Runs in under a minute."""

import torch

import whatmatters as wm

model, tokenizer = wm.embedded.load()
data = wm.data.calibration(tokenizer, wm.embedded.documents("calibration")[:40], samples=32, length=128)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

with wm.tune.LISA(n_active=2, interval=4).attach(model, optimizer) as lisa:
    for step in range(12):
        lisa.before_step(step)
        ids = data.inputs[torch.randint(len(data.inputs), (4,))]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step % 4 == 0:
            print(f"step {step}: loss {loss:.3f}, layers {lisa.active_layers}, bytes {lisa.memory()}")
        optimizer.step()
        optimizer.zero_grad()
