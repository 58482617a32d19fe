"""What the pruning tests share: models of every family with calibration data, and what goes into each site, seen without our code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from whatmatters.core.data import Calibration
from whatmatters.testing.families import build, inputs


def correlated(family: str, samples: int = 6, length: int = 24, batch: int = 2) -> Calibration:
    """Calibration data of a family; the vectors of the plain network are correlated."""
    values = inputs(family, samples=samples, length=length)
    if family == "sequential":
        values = values @ torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    return Calibration.from_tensors(values, batch=batch if family != "sequential" else 16)


@pytest.fixture
def case() -> Callable[[str], tuple[nn.Module, Calibration]]:
    """A family's model and calibration data."""
    return lambda family: (build(family), correlated(family))


@pytest.fixture
def seen() -> Callable[[nn.Module, Calibration], dict[str, Tensor]]:
    """All tokens that go into each site of a model as it is, from plain hooks on whole forward passes; experts by their own arithmetic."""

    def look(model: nn.Module, calibration: Calibration) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}

        def linear(name: str) -> Callable[..., None]:
            return lambda module, args: found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

        def experts(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                hidden, chosen = args[:2]
                for index in range(module.num_experts):
                    x = hidden[(chosen == index).any(-1)]
                    gate, up = (x @ module.gate_up_proj[index].T).chunk(2, -1)
                    found.setdefault(f"{name}.gate_up_proj[{index}]", []).append(x)
                    found.setdefault(f"{name}.down_proj[{index}]", []).append(module.act_fn(gate) * up)

            return hook

        handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or hasattr(module, "nf"):
                handles.append(module.register_forward_pre_hook(linear(name)))
            elif hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
                handles.append(module.register_forward_pre_hook(experts(name)))
        with torch.no_grad():
            model(calibration.inputs)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in found.items()}

    return look
