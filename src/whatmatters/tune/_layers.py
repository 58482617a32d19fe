"""What methods share that train a few layers at a time: which parameters a layer has, freezing, optimizer state, bytes.

A switch is between two optimizer steps. Frozen parameters have no gradient at all (a gradient of zero would still be decayed and moved by
stale momentum) and are given back as the user had them in the end.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from whatmatters.core.errors import InputError, ModelError
from whatmatters.core.sites import find_blocks

__all__ = ["Layers", "layer_weight_norms"]

STATES = ("drop", "keep", "offload")


class Layers:
    """The layers of a model under an optimizer, of which some train.

    Args:
        model: any module whose layers can be found.
        optimizer: an optimizer that holds every parameter that may train.
        names: names of the layers; None: the blocks of the model.
        always: beginnings of the names of parameters outside the layers that always train; None: all of them.
        state: what becomes of the optimizer state of a layer that is frozen: "drop" (it starts anew), "keep", "offload" (to the CPU).

    Raises:
        ModelError: no layers, a layer without parameters that train, quantized weights, or parameters that the optimizer does not hold.
        InputError: an unknown name or state.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, names: Sequence[str] | None, always: Collection[str] | None, state: str
    ) -> None:
        if state not in STATES:
            raise InputError(f"state is {state!r}; expected {', '.join(map(repr, STATES))}")
        self.model, self.optimizer, self.state = model, optimizer, state
        self.names = tuple(names) if names is not None else find_blocks(model)
        modules = dict(model.named_modules())
        for name in self.names:
            if name not in modules:
                raise InputError(f"no layer named {name!r}; model.named_modules() lists them")
        self.parameters = [[p for p in modules[name].parameters() if p.requires_grad] for name in self.names]
        inside = {id(p) for own in self.parameters for p in own}
        self.outside = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
        self._check()
        self.frozen_outside = [p for n, p in self.outside if always is not None and not n.startswith(tuple(always))]
        self.active: tuple[int, ...] | None = None

    def _check(self) -> None:
        empty = [name for name, own in zip(self.names, self.parameters, strict=True) if not own]
        if not self.names or empty:
            raise ModelError(f"layer {empty[0]!r} has no parameters that train" if empty else "the model has no layers")
        shared = len([p for own in self.parameters for p in own]) - len({id(p) for own in self.parameters for p in own})
        if shared:
            raise ModelError(f"{shared} parameters belong to two layers; layers that train apart need parameters of their own")
        integers = [n for n, p in self.model.named_parameters() if not p.is_floating_point()]
        if integers:
            raise ModelError(f"{integers[0]} is quantized and has no gradient; train the model it came from")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        lacking = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if lacking:
            raise ModelError(
                f"the optimizer does not hold {lacking[0]} ({len(lacking)} such parameters), which would get gradients and never move; "
                "make the optimizer from all parameters before anything is frozen"
            )

    def activate(self, indices: Sequence[int]) -> None:
        """Train these layers and no others."""
        for index, own in enumerate(self.parameters):
            for parameter in own:
                self._train(parameter, index in indices)
        for parameter in self.frozen_outside:
            self._train(parameter, False)
        self.active = tuple(indices)

    def _train(self, parameter: nn.Parameter, trains: bool) -> None:
        parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
        held = self.optimizer.state.get(parameter)
        if not held:
            return
        if not trains and self.state == "drop":
            del self.optimizer.state[parameter]
        elif self.state == "offload":
            device = parameter.device if trains else torch.device("cpu")
            self.optimizer.state[parameter] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in held.items()}

    def restore(self) -> None:
        """Let everything train that did before."""
        for parameter in [p for own in self.parameters for p in own] + [p for _, p in self.outside]:
            parameter.requires_grad_(True)
        self.active = None

    def memory(self) -> dict[str, int]:
        """Bytes of live tensors: "parameters", "gradients", "optimizer_state"; offloaded states apart, as "offloaded_state"."""
        states = [(p, v) for p, held in self.optimizer.state.items() for v in held.values() if isinstance(v, Tensor)]
        away = sum(v.nbytes for p, v in states if v.device != p.device and v.dim() > 0)
        return {
            "parameters": sum(p.nbytes for p in self.model.parameters()),
            "gradients": sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None),
            "optimizer_state": sum(v.nbytes for _, v in states) - away,
            "offloaded_state": away,
        }


def layer_weight_norms(model: nn.Module, *, kind: str = "l2", names: Sequence[str] | None = None) -> dict[str, float]:
    """Size of the weights of each layer, and of the embedding and the head where the model names them: LISA's diagnostic.

    Args:
        model: any module whose layers can be found.
        kind: "l2", the norm over all parameters of a layer; "mean_abs", the mean absolute value.
        names: names of the layers; None: the blocks of the model.

    Returns:
        Norm by name, "embedding" first and "head" last; average it over training to see what the paper saw.

    Raises:
        InputError: an unknown kind.
        ModelError: no layers.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = torch.nn.init.ones_(model[0].weight)
        >>> layer_weight_norms(model, names=["0"])
        {'0': 2.0}
    """
    if kind not in ("l2", "mean_abs"):
        raise InputError(f"kind is {kind!r}; expected 'l2' or 'mean_abs'")
    found = {name: model.get_submodule(name) for name in (names if names is not None else find_blocks(model))}
    for label, getter in (("embedding", "get_input_embeddings"), ("head", "get_output_embeddings")):
        end = getattr(model, getter, lambda: None)()
        if end is not None:
            found = {label: end, **found} if label == "embedding" else {**found, label: end}
    flat = {name: [p.detach().float().flatten() for p in module.parameters()] for name, module in found.items()}
    whole = {name: torch.cat(own) for name, own in flat.items() if own}
    return {name: float(torch.linalg.vector_norm(v) if kind == "l2" else v.abs().mean()) for name, v in whole.items()}
