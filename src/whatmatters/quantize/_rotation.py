"""Rotations of a model that leave what it computes as it was and spread outliers over all channels, so that grids fit better.

The residual stream x becomes x Q with an orthogonal Q: norm gains are folded into the matrices that read the normalised stream, those
matrices become W Q, matrices that write the stream become Q'W, the embedding E Q. Values are also rotated within each head, between the
value and the output projection. Both fold into the weights. Following QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) as used by RSQ;
unlike RSQ's code the mean of the embedding is not subtracted, which an RMS norm would not forgive.

What reads and what writes is found by watching one forward pass, not by names; then the rotated model is compared with the original in
float64, block by block in bounded memory, before any work begins.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from whatmatters.core.capture import settings_of
from whatmatters.core.catalog import door
from whatmatters.core.data import call_model
from whatmatters.core.errors import InputError, ModelError, NonFiniteError
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report, measured
from whatmatters.core.seeds import derived, generator
from whatmatters.core.sites import Structure, replaced_forward
from whatmatters.core.sites import structure as find_structure
from whatmatters.core.walk import Block, walk
from whatmatters.quantize._common import check_sites

__all__ = ["hadamard", "random_orthogonal", "rotate"]

MODES = ("hadamard", "random", "online")
"""Kinds of rotation; "online" is "hadamard" with those added that a model must compute as it runs."""

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit: norms compute in float32 even in a float64 model."""
TOKENS = 4
"""Tokens of the forward pass that is watched."""
VOCABULARY = 256
"""Logits that are compared: the head need not be held twice."""
CHUNK = 1 << 20
"""Weights rotated at a time."""


def hadamard(n: int, seed: int = 0) -> Float64[Tensor, "n n"]:
    """A randomised Hadamard rotation: random signs times a Hadamard matrix divided by sqrt(n), so that all entries are +-1/sqrt(n).

    Sizes are a power of two times 1 or the order of a Paley matrix (12, 20, 28, ...).

    Args:
        n: size.
        seed: decides the signs.

    Raises:
        InputError: no Hadamard matrix of that size is known here.

    Example:
        >>> bool(torch.allclose(hadamard(12).abs(), torch.tensor(12.0).double().rsqrt()))
        True

    References:
        R. E. A. C. Paley, "On orthogonal matrices", 1933.
    """
    factors = _hadamard_factors(n)
    if factors is None:
        raise InputError(
            f"no Hadamard matrix of size {n} is at hand; expected a power of two times 1, 12, 20, 28, ...: use random_orthogonal"
        )
    return Rotation(_signs(n, seed), *factors).matrix()


def random_orthogonal(n: int, seed: int = 0) -> Float64[Tensor, "n n"]:
    """A rotation (or reflection) drawn uniformly: the Q of a Gaussian matrix, columns signed by the diagonal of R.

    Args:
        n: size, at least 1.
        seed: decides the draw.

    Example:
        >>> q = random_orthogonal(5)
        >>> bool(torch.allclose(q @ q.T, torch.eye(5, dtype=torch.float64)))
        True
    """
    if n < 1:
        raise InputError(f"a rotation of size {n}; expected at least 1")
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator(derived(seed, "orthogonal", n)), dtype=torch.float64))
    return q * r.diagonal().sign()


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (left x right), with the Kronecker product: applied in two small products, not a large one."""

    signs: Float64[Tensor, " n"]
    left: Float64[Tensor, "a a"]
    right: Float64[Tensor, "b b"]

    def rows(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """x Q, in the dtype of x (at least float32 inside)."""
        work = x if x.dtype == torch.float64 else x.float()
        y = (work * self.signs.to(work)).unflatten(-1, (len(self.left), len(self.right))) @ self.right.to(work)
        if len(self.left) > 1:
            y = self.left.T.to(work) @ y
        return y.flatten(-2).to(x.dtype)

    def matrix(self) -> Float64[Tensor, "n n"]:
        """Q itself."""
        return self.rows(torch.eye(len(self.signs), dtype=torch.float64))


def rotation(n: int, mode: str, seed: int) -> Rotation:
    """The rotation of size n; a random one where no Hadamard matrix of that size is at hand."""
    factors = None if mode == "random" else _hadamard_factors(n)
    if factors is None:
        one = torch.ones(1, 1, dtype=torch.float64)
        return Rotation(torch.ones(n, dtype=torch.float64), one, random_orthogonal(n, seed))
    return Rotation(_signs(n, seed), *factors)


def _signs(n: int, seed: int) -> Float64[Tensor, " n"]:
    return torch.randint(2, (n,), generator=generator(derived(seed, "signs", n))).double() * 2 - 1


def _hadamard_factors(n: int) -> tuple[Float64[Tensor, "a a"], Float64[Tensor, "b b"]] | None:
    """Two orthogonal Hadamard matrices divided by their norms, sizes multiplying to n; None if no construction here gives one."""
    if n < 1:
        raise InputError(f"a rotation of size {n}; expected at least 1")
    power = (n & -n).bit_length() - 1
    if n == 1 << power:
        small = 1 << (power // 2)
        return _scaled(scipy.linalg.hadamard(small)), _scaled(scipy.linalg.hadamard(n // small))
    for exponent in range(2, power + 1):
        order = (n >> power) << exponent
        matrix = _paley(order)
        if matrix is not None:
            return _scaled(matrix), _scaled(scipy.linalg.hadamard(n // order))
    return None


def _scaled(matrix: np.ndarray) -> Float64[Tensor, "a a"]:
    return torch.from_numpy(matrix.astype(np.float64)) / len(matrix) ** 0.5


def _paley(order: int) -> np.ndarray | None:
    """Paley's Hadamard matrix: order q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4."""
    if _is_prime(order - 1) and order % 4 == 0:
        core = _jacobsthal(order - 1)
        return np.eye(order, dtype=np.int64) + np.block([[np.zeros((1, 1)), np.ones((1, order - 1))], [-np.ones((order - 1, 1)), core]])
    q = order // 2 - 1
    if _is_prime(q) and q % 4 == 1:
        conference = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), _jacobsthal(q)]])
        return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None


def _jacobsthal(q: int) -> np.ndarray:
    """Entry (i, j) is 1 where i - j is a nonzero square modulo the prime q, 0 where it is zero, else -1."""
    symbol = np.full(q, -1)
    symbol[[i * i % q for i in range(1, q)]] = 1
    symbol[0] = 0
    index = np.arange(q)
    return symbol[(index[:, None] - index[None, :]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


@dataclass(frozen=True)
class Matrix:
    """What a matrix of a block does with the residual stream.

    Attributes:
        parameter: its name in the block; all slices of a 3-D parameter have one role.
        stored_transposed: the parameter stores (in, out).
        bias: name of its bias in the block.
        norm: name of the norm whose output it reads; None if it reads something else.
        writes: its output is added to the residual stream.
        value_heads: heads of its output, for the value projection of an attention.
        output_heads: heads of its input, for the output projection of an attention.
    """

    parameter: str
    stored_transposed: bool
    bias: str | None
    norm: str | None
    writes: bool
    value_heads: int = 0
    output_heads: int = 0


@dataclass
class Layout:
    """Where the residual stream of a model is read and written.

    Attributes:
        size: width of the stream.
        blocks: the matrices of each block that read or write it.
        embedding: name of the embedding's weight.
        norm: name of the final norm.
        head: name of the output head.
        offsets: what each norm adds to its weight to make its gain, by name of the norm.
    """

    size: int
    blocks: dict[str, list[Matrix]]
    embedding: str
    norm: str
    head: str
    offsets: dict[str, float]

    def gain(self, norm: str, module: nn.Module) -> Float64[Tensor, " d"]:
        """What a norm multiplies each channel by."""
        return next(module.parameters()).detach().double() + self.offsets[norm]

    def without_gain(self, norm: str, module: nn.Module) -> Float[Tensor, " d"]:
        """The weight that makes a norm's gain one."""
        return torch.full_like(next(module.parameters()).detach(), 1.0 - self.offsets[norm])


@dataclass(frozen=True, eq=False)
class _Use:
    """One product with a parameter, seen in a forward pass."""

    parameter: str
    stored_transposed: bool
    bias: str | None
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class _NormUse:
    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor


@dataclass
class _Seen:
    """What was seen of one block, or of what is outside all blocks."""

    uses: list[_Use] = field(default_factory=list)
    norms: list[_NormUse] = field(default_factory=list)
    attentions: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # value, output: (batch, heads, length, size)


class _Watch(TorchFunctionMode):
    """Notes every product with a parameter and every attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = [(name, p.detach()) for name, p in model.named_parameters()]
        self.parameters = {p.untyped_storage().data_ptr(): (name, p) for name, p in named}
        self.seen: dict[str, _Seen] = {"": _Seen()}
        self.block = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        here = self.seen[self.block]
        if func is functional.scaled_dot_product_attention:
            here.attentions.append((args[2], output))
        elif func in (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm):
            self._note(here, args[0], args[1], args[2] if len(args) > 2 else (kwargs or {}).get("bias"), output, func is functional.linear)
        elif func is torch.addmm:
            self._note(here, args[1], args[2], args[0], output, False)
        return output

    def _note(self, here: _Seen, x: Any, weight: Any, bias: Any, output: Tensor, is_linear: bool) -> None:
        name, whole = self._parameter(weight)
        if name is None or whole is None or weight.dim() != 2 or x.numel() == 0:
            return
        as_stored = weight.stride() == whole.stride()[-2:]
        flat = (x.detach().reshape(-1, x.shape[-1]), output.detach().reshape(-1, output.shape[-1]))
        here.uses.append(_Use(name, is_linear != as_stored, self._parameter(bias)[0], *flat))

    def _parameter(self, tensor: Any) -> tuple[str | None, Tensor | None]:
        known = self.parameters.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
        return known if known is not None else (None, None)


def find_layout(model: nn.Module, found: Structure) -> Layout:
    """Find out by one forward pass which matrices read the residual stream, through which norm, and which write it.

    A norm is a module whose parameters are all vectors as wide as the stream. A matrix reads it if all its inputs are rows of its output;
    a matrix whose output is as wide as the stream and that reads no such norm writes the stream. Norms of a matrix's output (of queries
    and keys) are no part of it.

    Raises:
        ModelError: not a causal language model, or a norm that is no RMS norm with a plain gain.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no embedding and linear output head; rotations are for causal language models")
    size = weight.shape[1]
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch(model)
    last: list[Tensor] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            watch.block = name
            watch.seen.setdefault(name, _Seen())

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.block = ""
        last[:] = [output if isinstance(output, Tensor) else output[0]]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if not (args and isinstance(output, Tensor) and output.shape[-1] == size):
            return
        rows = (args[0].detach().reshape(-1, size), output.detach().reshape(-1, size))
        watch.seen[watch.block].norms.append(_NormUse(names[module], module, *rows))

    try:
        for module, name in names.items():
            own = list(module.parameters())
            if own and all(p.shape == (size,) for p in own) and not list(module.children()):
                handles.append(module.register_forward_hook(note))
            if name in found.blocks:
                handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        with torch.no_grad(), _evaluating(model), watch:
            call_model(model, _example(weight))
    finally:
        for handle in handles:
            handle.remove()
    offsets: dict[str, float] = {}
    blocks = {name: _matrices(name, watch.seen.get(name, _Seen()), size, offsets) for name in found.blocks}
    ends = last[0].detach().reshape(-1, size) if last and last[0].shape[-1] == size else torch.empty(0, size)
    heads = [use for use in watch.seen[""].uses if use.outputs.shape[-1] == head.out_features and use.inputs.shape[-1] == size]
    final = [n for n in watch.seen[""].norms if torch.equal(n.inputs, ends) and any(_among(use.inputs, n.outputs) for use in heads)]
    if len(final) != 1 or len(heads) != 1:
        raise ModelError(f"{type(model).__name__}: no norm stands between the last block and the output head; use rotate=None")
    offsets[final[0].name] = _gain_offset(final[0])
    return Layout(size, blocks, f"{names[embedding]}.weight", final[0].name, names[head], offsets)


def _example(embedding: Tensor) -> Tensor:
    return torch.linspace(0, len(embedding) - 1, TOKENS, device=embedding.device).long()[None]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, plain loops of experts and, if the model has it, fused attention (a function call to watch); restored afterwards."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        fused = {"_attn_implementation": "sdpa"} if getattr(model, "_supports_sdpa", True) else {}
        with settings_of(model, _experts_implementation="eager", **fused):
            yield
    finally:
        for module, was in training.items():
            module.training = was


def _among(rows: Tensor, known: Tensor) -> bool:
    """Whether every row is, bit for bit, one of the known rows."""
    if rows.shape[-1] != known.shape[-1]:
        return False
    return bool((rows[:, None] == known[None]).all(-1).any(1).all())


def _gain_offset(norm: _NormUse) -> float:
    """What a norm adds to its weight to make its gain: 0, or 1 where the weight is the gain's distance from one.

    Raises unless output = (weight + offset) * input * (a factor of each token). If both offsets do, as for a weight of equal numbers, the
    one counts whose factor is nearer to one over the root mean square of the input.
    """
    x, y = norm.inputs.double(), norm.outputs.double()
    gains = [p.detach().double() for p in norm.module.parameters()]
    rms = x.square().mean(-1, keepdim=True).sqrt()
    fitting: list[tuple[float, float]] = []
    for offset in (0.0, 1.0):
        scaled = x * (gains[0] + offset)
        factor = (y * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True).clamp(min=1e-300)
        off = float((y - factor * scaled).norm() / y.norm().clamp(min=1e-300))
        if len(gains) == 1 and off <= max(1e-4, 8 * torch.finfo(norm.outputs.dtype).eps):
            fitting.append((float((factor * rms - 1).abs().mean()), offset))
    if not fitting:
        raise ModelError(
            f"{norm.name} ({type(norm.module).__name__}) is no RMS norm with a plain gain (it subtracts a mean, adds a bias, or its gain "
            "is neither its weight nor one more), so a rotation of the residual stream would change the model; use rotate=None"
        )
    return min(fitting)[1]


def _matrices(block: str, seen: _Seen, size: int, offsets: dict[str, float]) -> list[Matrix]:
    stream = [n for n in seen.norms if not any(_among(n.inputs, use.outputs) for use in seen.uses)]
    offsets |= {norm.name: _gain_offset(norm) for norm in stream}
    source = {use.parameter: next((norm.name for norm in stream if _among(use.inputs, norm.outputs)), None) for use in seen.uses}
    pairs = [pair for pair in _heads(seen) if source[pair[0]] is not None and source[pair[2]] is None]
    value = {parameter: heads for parameter, heads, _, _ in pairs}
    output = {parameter: heads for _, _, parameter, heads in pairs}
    result: dict[str, Matrix] = {}
    for use in seen.uses:
        reads = next((norm.name for norm in stream if _among(use.inputs, norm.outputs)), None)
        writes = reads is None and use.outputs.shape[-1] == size
        local = [None if n is None else n.removeprefix(f"{block}.") for n in (use.parameter, use.bias, reads)]
        found = Matrix(
            local[0] or "", use.stored_transposed, local[1], local[2], writes,
            value.get(use.parameter, 0), output.get(use.parameter, 0),
        )  # fmt: skip
        if result.setdefault(use.parameter, found) != found:
            raise ModelError(f"{use.parameter} is used in two ways, of which a rotation can serve one; use rotate=None")
    lost = [norm.name for norm in stream if not any(m.norm and f"{block}.{m.norm}" == norm.name for m in result.values())]
    if lost or not any(m.writes for m in result.values()):
        what = f"no matrix reads the output of {lost[0]}, so its gain has nowhere to go" if lost else "no matrix writes the residual stream"
        raise ModelError(f"{block}: {what}; use rotate=None")
    return [m for m in result.values() if m.norm or m.writes]


def _heads(seen: _Seen) -> list[tuple[str, int, str, int]]:
    """Value projection, its heads, output projection, its heads: for each attention between exactly such two."""
    pairs: list[tuple[str, int, str, int]] = []
    for value, output in seen.attentions:
        batch, heads, length, size = output.shape
        after = [use for use in seen.uses if use.inputs.shape == (batch * length, heads * size)]
        after = [use for use in after if torch.equal(use.inputs, output.detach().transpose(1, 2).reshape(batch * length, -1))]
        for use in seen.uses:
            kv, rest = divmod(use.outputs.shape[-1], size)
            if rest or kv == 0 or heads % kv or len(use.outputs) != batch * length or value.shape[-1] != size or len(after) != 1:
                continue
            made = use.outputs.view(batch, length, kv, size).transpose(1, 2).repeat_interleave(value.shape[1] // kv or 1, dim=1)
            if torch.equal(made, value.detach()):
                pairs.append((use.parameter, kv, after[0].parameter, heads))
    return pairs


@dataclass(frozen=True, eq=False)
class Online:
    """A forward pre-hook that rotates a module's input: along all of it, or across heads of `inner` channels each."""

    rotation: Rotation
    inner: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_across(args[0], self.rotation, self.inner), *args[1:])


def _across(x: Float[Tensor, "*rows n"], rotation: Rotation, inner: int) -> Float[Tensor, "*rows n"]:
    return rotation.rows(x.unflatten(-1, (-1, inner)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)


class Rotator:
    """The rotations of one model, proved to leave it as it is: for use inside a walk.

    `start`, `outside` and `prepare` are what `core.walk.walk` takes by those names; `rotate` is for the visit of a block.

    Raises:
        ModelError: the model has no residual stream that can be rotated.
    """

    def __init__(self, model: nn.Module, found: Structure, mode: str, seed: int) -> None:
        if mode not in MODES:
            raise InputError(f"rotate={mode!r:.40}; expected one of {', '.join(map(repr, MODES))}, or None")
        self.model = model
        self.mode = mode
        self.seed = seed
        self.layout = find_layout(model, found)
        self.stream = rotation(self.layout.size, mode, derived(seed, "stream"))
        self.notes: list[str] = []
        self._check_model()
        self._describe()

    def start(self, hidden: Tensor) -> Tensor:
        """Inputs of the first block, rotated."""
        return self.stream.rows(hidden.double()).to(hidden.dtype)

    def rotate(self, name: str, block: nn.Module) -> None:
        """Rotate the weights of a copy of a block, in place; each weight is rounded to its dtype once."""
        norms = {f"{name}.{m.norm}": block.get_submodule(m.norm) for m in self.layout.blocks[name] if m.norm}
        gains = {norm: self.layout.gain(norm, module) for norm, module in norms.items()}
        online = self._online(name, block)
        for matrix in self.layout.blocks[name]:
            gain = gains[f"{name}.{matrix.norm}"] if matrix.norm else None
            weight = block.get_parameter(matrix.parameter).detach()
            for part in weight if weight.dim() == 3 else [weight]:
                work = part.double()
                view = work.T if matrix.stored_transposed else work
                if gain is not None:
                    view.mul_(gain)
                    _rotate_rows(view, self.stream)
                if matrix.writes:
                    _rotate_rows(view.T, self.stream)
                if matrix.value_heads:
                    heads = view.T.unflatten(-1, (matrix.value_heads, -1))
                    _rotate_rows(heads, self._of_heads(heads.shape[-1]))
                if matrix.output_heads:
                    heads = view.unflatten(-1, (matrix.output_heads, -1))
                    _rotate_rows(heads, self._of_heads(heads.shape[-1]))
                if (hook := online.get(matrix.parameter)) is not None:
                    _rotate_rows(view.unflatten(-1, (-1, hook.inner)).transpose(-1, -2), hook.rotation)
                part.copy_(work)
            if matrix.bias is not None and (matrix.writes or matrix.value_heads):
                bias = block.get_parameter(matrix.bias).detach()
                if matrix.writes:
                    bias.copy_(self.stream.rows(bias.double()))
                else:
                    heads = bias.double().unflatten(-1, (matrix.value_heads, -1))
                    bias.copy_(self._of_heads(heads.shape[-1]).rows(heads).flatten())
        for norm, module in norms.items():
            next(module.parameters()).detach().copy_(self.layout.without_gain(norm, module))

    def _of_heads(self, size: int) -> Rotation:
        return rotation(size, self.mode, derived(self.seed, "head"))

    def _online(self, name: str, block: nn.Module) -> dict[str, Online]:
        """The rotations that a block computes as it runs, by parameter of the matrix whose input they rotate."""
        hooks: dict[str, Online] = {}
        if self.mode != "online":
            return hooks
        for matrix in self.layout.blocks[name]:
            module = block.get_submodule(matrix.parameter.rpartition(".")[0])
            if matrix.writes and isinstance(module, nn.Linear):
                inner = module.in_features // matrix.output_heads if matrix.output_heads else 1
                hooks[matrix.parameter] = Online(rotation(module.in_features // inner, self.mode, derived(self.seed, "online")), inner)
        return hooks

    def prepare(self, name: str, block: nn.Module) -> list[Any]:
        """Add what the block must compute as it runs, if anything; returns the handles that take it away again."""
        return [
            block.get_submodule(parameter.rpartition(".")[0]).register_forward_pre_hook(hook)
            for parameter, hook in self._online(name, block).items()
        ]

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """New values of embedding, head and final norm, then the hooks of what is computed as the model runs.

        The head is read after the embedding was written, when they are no longer tied.
        """
        embedding = self.model.get_parameter(self.layout.embedding).detach()
        yield self.layout.embedding, _as_narrow(embedding, _rotated(embedding, self.stream, None))
        norm = self.model.get_submodule(self.layout.norm)
        name, _ = next(norm.named_parameters())
        head = self.model.get_parameter(f"{self.layout.head}.weight").detach()
        yield f"{self.layout.head}.weight", _as_narrow(head, _rotated(head, self.stream, self.layout.gain(self.layout.norm, norm)))
        yield f"{self.layout.norm}.{name}", self.layout.without_gain(self.layout.norm, norm)
        if self.mode == "online":
            for block in self.layout.blocks:
                self.prepare(block, self.model.get_submodule(block))
            self.model.whatmatters_online = True  # type: ignore[assignment]

    def _check_model(self) -> None:
        """Raises unless logits of the rotated model are those of the original: both in float64, one copy of one block at a time."""
        before = self._logits(False)
        if not torch.isfinite(before).all():
            raise NonFiniteError(f"{type(self.model).__name__} gives logits that are NaN or infinite; repair the checkpoint")
        after = self._logits(True)
        difference = float((after - before).abs().max() / before.abs().max().clamp(min=1e-300))
        if not difference <= TOLERANCE:
            raise ModelError(
                f"{type(self.model).__name__} rotated gives other logits (relative difference {difference:.2g}): it has parts, such as "
                "norms after a sublayer or learned positions, that a rotation of the residual stream does not pass through; use rotate=None"
            )

    def _logits(self, rotated: bool) -> Float64[Tensor, "tokens vocabulary"]:
        model, layout = self.model, self.layout
        head = model.get_submodule(layout.head)
        norm = model.get_submodule(layout.norm)
        rows = torch.linspace(0, head.get_parameter("weight").shape[0] - 1, VOCABULARY).long().unique()
        result: list[Tensor] = []

        def embed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return self.stream.rows(output.double()) if rotated else output.double()

        def run(name: str, block: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                module = copy.deepcopy(block)
                del module.__dict__["forward"]
                module.double()
                if rotated:
                    self.rotate(name, module)
                    self.prepare(name, module)
                return module(*_double(args), **_double(kwargs))

            return forward

        def finish(hidden: Tensor) -> Tensor:
            module = copy.deepcopy(norm)
            del module.__dict__["forward"]
            module.double()
            gain = layout.gain(layout.norm, module)
            weight = head.get_parameter("weight").detach()[rows.to(hidden.device)]
            weight = _rotated(weight.double(), self.stream, gain) if rotated else weight.double()
            if rotated:
                next(module.parameters()).detach().copy_(layout.without_gain(layout.norm, module))
            result.append(functional.linear(module(hidden), weight).reshape(-1, len(rows)))
            return hidden

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_evaluating(model))
            for name in layout.blocks:
                block = model.get_submodule(name)
                stack.enter_context(replaced_forward([block], run(name, block)))
            stack.enter_context(replaced_forward([norm], finish))
            stack.enter_context(replaced_forward([head], lambda hidden: hidden))
            embedding = model.get_submodule(layout.embedding.rpartition(".")[0])
            stack.callback(embedding.register_forward_hook(embed).remove)
            call_model(model, _example(model.get_parameter(layout.embedding)))
        return result[0]

    def _describe(self) -> None:
        parameters = {id(p): p for p in self.model.parameters()}
        size = sum(p.nbytes for p in parameters.values())
        embedding = self.model.get_parameter(self.layout.embedding)
        head = self.model.get_parameter(f"{self.layout.head}.weight")
        if head is embedding:
            more = f"embedding and head, one tensor before, became two: parameters grew from {size / 1e6:.2f} MB to"
            self.notes.append(f"{more} {(size + head.nbytes) / 1e6:.2f} MB before any rounding")
        else:
            self.notes.append(f"embedding and head were two tensors already: {size / 1e6:.2f} MB of parameters before any rounding")
        without = [name for name, matrices in self.layout.blocks.items() if not any(m.value_heads for m in matrices)]
        if without:
            why = "value and output projection of an attention were not found"
            self.notes.append(f"no rotation within heads in {len(without)} blocks, first {without[0]}: {why}")
        if self.mode != "random" and _hadamard_factors(self.layout.size) is None:
            self.notes.append(f"no Hadamard matrix of size {self.layout.size} is at hand: the residual stream is rotated by a random one")
        if self.mode == "online":
            self.notes.append("some rotations are computed as the model runs; the model cannot be saved")


def _double(value: Any) -> Any:
    """Floating-point tensors in float64, wherever they are inside tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    return type(value)(map(_double, value)) if type(value) in (tuple, list) else value


def _rotate_rows(view: Float64[Tensor, "rows ..."], rotation: Rotation) -> None:
    """x Q for all vectors along the last dimension, in place, a slice of rows at a time."""
    rows = max(1, CHUNK // max(1, view[0].numel()))
    for start in range(0, len(view), rows):
        part = view[start : start + rows]
        part.copy_(rotation.rows(part))


def _rotated(weight: Float[Tensor, "rows d"], rotation: Rotation, gain: Float[Tensor, " d"] | None) -> Float[Tensor, "rows d"]:
    """(W diag(gain)) Q in the dtype of W, a slice of rows at a time in float64."""
    result = torch.empty_like(weight)
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].double()
        result[start : start + rows] = rotation.rows(part if gain is None else part * gain.double())
    return result


def _as_narrow(before: Float[Tensor, "rows d"], after: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """`after`, rounded to float16 if `before` held float16 numbers in a wider dtype: else a checkpoint would need twice the bytes."""
    half = torch.float16
    if before.dtype == torch.float32 and torch.equal(before.to(half).float(), before) and bool(torch.isfinite(after.to(half)).all()):
        return after.to(half).float()
    return after


@door("quantize.rotate")
def rotate(
    model: nn.Module,
    *,
    mode: str = "hadamard",
    seed: int = 0,
    structure: Structure | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Rotate a model in place so that it computes what it did, with outliers spread over all channels.

    Embedding and head become two tensors if they were one; norm gains become 1. Before anything changes, the rotated logits are compared
    with the original ones.

    Args:
        model: a causal language model with RMS norms before its sublayers.
        mode: "hadamard": random signs times a Hadamard matrix; "random": a uniformly drawn rotation; "online": "hadamard", and the inputs
            of output and down projections are rotated as the model runs. Such a model cannot be saved.
        seed: decides the rotation.
        structure: what `core.sites.structure` found, if at hand.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told after each block.

    Returns:
        A report with a row for each block; its notes tell the size after untying.

    Raises:
        ModelError: the model has LayerNorms or other parts that a rotation does not pass through.
        InputError: an unknown mode.
        ResumeError: `run_dir` was made with other inputs.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> [row["matrices"] for row in rotate(LlamaForCausalLM(config)).rows]
        [7]

    References:
        Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, arXiv 2404.00456.
    """
    found = find_structure(model) if structure is None else structure
    check_sites(model, found, allow_uncovered=True)
    report = Report("rotate", "quantize", {"mode": mode, "seed": seed})
    with measured(report):
        rotator = Rotator(model, found, mode, seed)

        def visit(block: Block) -> dict[str, Any]:
            rotator.rotate(block.name, block.module)
            return {"block": block.name, "matrices": len(rotator.layout.blocks[block.name])}

        result = walk(
            model, None, visit, structure=found, settings={"method": "rotate", **report.settings}, label="rotate", outside=rotator.outside,
            run_dir=run_dir, resume=resume, progress=progress,
        )  # fmt: skip
    report.rows = result.rows
    report.notes = rotator.notes
    return report
