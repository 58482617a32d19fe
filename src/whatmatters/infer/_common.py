"""What methods of sparse activation share: how many channels each site keeps, the gate in front of a linear, and the handle that undoes it.

A gate stands in for the `forward` of one linear. One token at a time on its own (decoding) it multiplies over the kept channels only, with
the weights laid out so that skipped ones are not read. More tokens at once (prefill, evaluation) go through a masked dense product: the
same mathematics, and no faster than the dense model.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from whatmatters.core.actions import check_names_fit
from whatmatters.core.allocation import threshold, top_k
from whatmatters.core.data import Calibration
from whatmatters.core.errors import BudgetError, DataError, InputError, InputTypeError, ModelError, NonFiniteError
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress, track
from whatmatters.core.report import Report, measured
from whatmatters.core.sites import Site, Structure, structure, version_of
from whatmatters.core.walk import Block, give_memory_back, walk
from whatmatters.kernels.sparse_gemv import face_for, sparse_gemv, warm_up

BINS = 1 << 19
"""Cells of the histogram of scores: the sign-less upper 20 bits of a float32, a resolution of 1 in 2,048 at every magnitude."""

MASKS = ("topk", "threshold")


# Budgets


def exact_share(sparsity: object) -> Fraction:
    """The share of the channels that is skipped, as it was written in decimals.

    Raises:
        InputTypeError: it is no number.
        BudgetError: it is not from 0 to below 1.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise InputTypeError(f"sparsity is {sparsity!r:.40}; expected a number from 0 to below 1, such as 0.5")
    if not 0 <= sparsity < 1:
        raise BudgetError(f"sparsity is {sparsity}; the feasible range is 0 to below 1: give the share of the channels to skip")
    return Fraction(str(sparsity))


def kept_channels(size: int, share: Fraction | float) -> int:
    """Channels kept of `size`: size * (1 - share) rounded down, as the official code does, but in decimals and not in binary fractions."""
    exact = size * (1 - (share if isinstance(share, Fraction) else Fraction(str(share))))
    nearest = round(exact)
    return nearest if abs(exact - nearest) <= size * Fraction(1, 10**9) else math.floor(exact)  # plans hold p / size as a float


def effective(shares: Mapping[str, float], sites: Iterable[Site]) -> float:
    """Share of the multiplications that is skipped over all sites."""
    sizes = {site.name: site.size for site in sites}
    return sum(sizes[name] * float(shares[name]) for name in sizes) / sum(sizes.values())


def as_plan(method: str, shares: Mapping[str, float], sparsity: float, how: str, found: Structure, step: float = 0.0) -> Plan:
    """Shares by site as a plan of kind "ratio", to be looked at, saved and used again."""
    achieved = effective(shares, [site for site in found.sites if site.name in shares])
    account = {"achieved": achieved, "unused": achieved - sparsity, "smallest_step": step}
    return Plan("ratio", dict(shares), {"sparsity": sparsity, "unit": "channel"}, account, method, {"allocation": how}, found)


def planned_shares(plan: Plan, sites: list[Site], found: Structure) -> dict[str, float]:
    """The shares of a plan of kind "ratio" for exactly these sites."""
    if plan.kind != "ratio":
        raise InputTypeError(f"a plan of kind {plan.kind!r} was given as allocation; expected kind 'ratio', a share for each site")
    check_names_fit(plan.values.keys(), Structure(found.blocks, tuple(sites)), "the plan")
    return {site.name: float(plan.values[site.name]) for site in sites}


# Positions


class Positions:
    """Where in their sequences the tokens of the present call are, so that the first ones stay dense also when a call is only a part.

    Args:
        prefix: positions below this one stay dense.
    """

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix
        self.first = 0
        self.ids: Tensor | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: `position_ids` if they are given, else how long the key-value cache is."""
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        ids, cache = given.get("position_ids"), given.get("past_key_values")
        self.ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        self.first = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0

    def forget(self, *_: Any) -> None:
        """A forward hook: what is called outside a call of the model starts at position 0."""
        self.ids, self.first = None, 0

    def dense(self, x: Float[Tensor, "*rows channels"]) -> Bool[Tensor, "*rows"] | None:
        """Which tokens of a site's input stay dense; None: none. Inputs of two dimensions that are no sequence have no positions."""
        if self.prefix == 0:
            return None
        if self.ids is not None and self.ids.shape[-1] * x.shape[0] == x.shape[:-1].numel() and x.dim() == 3:
            early = self.ids.to(x.device).expand(x.shape[:-1]) < self.prefix
            return early if bool(early.any()) else None
        if x.dim() < 3 or self.first >= self.prefix:
            return None
        return (torch.arange(self.first, self.first + x.shape[-2], device=x.device) < self.prefix).expand(x.shape[:-1])

    def watch(self, model: nn.Module, blocks: Iterable[str]) -> list[Any]:
        """Hook every module around the blocks that is told positions or a cache; returns the handles."""
        names = list(blocks)
        handles: list[Any] = []
        for name, module in model.named_modules():
            around = not name or any(block.startswith(f"{name}.") for block in names)
            if not around or not {"position_ids", "past_key_values"} & inspect.signature(module.forward).parameters.keys():
                continue
            handles.append(module.register_forward_pre_hook(self.note, with_kwargs=True))
            handles.append(module.register_forward_hook(self.forget, always_call=True))
        return handles


# Gates


class Rotation:
    """x Q, computed once for the sites that read the same x.

    Args:
        matrix: Q, orthogonal.
        readers: how many sites read it.
    """

    def __init__(self, matrix: Float[Tensor, "d d"], readers: int) -> None:
        self.matrix = matrix
        self.readers = readers
        self._given: Tensor | None = None
        self._made: Tensor | None = None
        self._state = (0, 0)  # version of what was given, readers still to come

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """x Q; the same tensor for each reader of one x."""
        version, left = self._state
        if self._made is None or self._given is not x or version != version_of(x):
            self._given, self._made, version, left = x, x @ self.matrix.to(x.dtype), version_of(x), self.readers
        made, left = self._made, left - 1
        if left == 0:  # nobody else needs it: it would only hold memory
            self._given = self._made = None
        self._state = (version, left)
        return made


class Signal:
    """The last output of a module: what CATS scores in place of a site's own input."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook."""
        self.value = output


@dataclass(eq=False)
class Gate:
    """Stands in for the `forward` of one linear: the channels whose score is small are left out.

    Attributes:
        site: the linear's site.
        module: the linear.
        plain: its own `forward`.
        norms: c of the score |x_j| c_j, float32; None: all one.
        keep: channels kept for each token; None: `bound` decides.
        bound: smallest score kept.
        positions: tells which tokens stay dense.
        rotation: applied to the input first.
        signal: scored in place of the input.
        watch: told the name of the site and its scores, each time it is used.
        skipped: tokens for which weights were not read.
        kept: channels kept for them, summed.
        masked: tokens that went through a dense product, masked or not.
    """

    site: Site
    module: nn.Module
    plain: Callable[[Tensor], Tensor]
    norms: Float[Tensor, " channels"] | None
    keep: int | None
    bound: float | None
    positions: Positions
    rotation: Rotation | None = None
    signal: Signal | None = None
    watch: Callable[[str, Tensor], None] | None = None
    skipped: int = 0
    kept: int = 0
    masked: int = 0

    def __call__(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows out"]:
        if self.rotation is not None:
            x = self.rotation(x)
        size = x.shape[-1]
        signal = None if self.signal is None else self.signal.value
        if self.watch is not None:
            self.watch(self.site.name, self.scores(x if signal is None else signal))
        if not self.skips:
            return self.plain(x)
        dense = self.positions.dense(x)
        parameter: Any = self.module.weight
        if x.numel() == size and not (torch.is_grad_enabled() and (x.requires_grad or parameter.requires_grad)):
            if dense is not None and bool(dense.all()):
                self.masked += 1
                return self.plain(x)
            weight = parameter.T if self.site.transposed else parameter
            try:
                y, kept = sparse_gemv(
                    weight, x.reshape(-1), self.norms, keep=self.keep, bound=self.bound,
                    signal=None if signal is None else signal.reshape(-1), bias=self.module.bias,  # type: ignore[arg-type]
                )  # fmt: skip
            except NonFiniteError as error:
                raise NonFiniteError(f"{self.site.name}: {error}") from error
            self.skipped += 1
            self.kept += kept
            return y.view(*x.shape[:-1], -1)
        self.masked += x.shape[:-1].numel()
        mask = self.mask(x if signal is None else signal)
        if dense is not None:
            mask = mask | dense[..., None]
        return self.plain(torch.where(mask, x, 0.0))

    @property
    def skips(self) -> bool:
        """Whether any channel can be skipped."""
        return self.keep != self.site.shape[1] and self.bound != -math.inf

    def scores(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """|x_j| c_j in float32."""
        scores = x.detach().float()
        scores = (scores if self.norms is None else scores * self.norms).abs()
        if not bool((scores < torch.inf).all()):
            raise NonFiniteError(f"{self.site.name}: an activation is NaN or infinite, so which channels matter is undefined")
        return scores

    def mask(self, x: Float[Tensor, "*rows channels"]) -> Bool[Tensor, "*rows channels"]:
        """The channels that are kept, by token."""
        scores = self.scores(x)
        return top_k(scores, self.keep) if self.keep is not None else threshold(scores, self.bound if self.bound is not None else 0.0)


def column_norms(weight: Float[Tensor, "out channels"]) -> Float[Tensor, " channels"]:
    """c_j, the Euclidean norm of what channel j is multiplied with, in float32."""
    return torch.linalg.vector_norm(weight.detach().float(), dim=0)


def gates_of(root: nn.Module) -> list[Gate]:
    """The gates that stand in a model now."""
    return [module.__dict__["forward"] for module in root.modules() if isinstance(module.__dict__.get("forward"), Gate)]


# The handle


class SparseActivations:
    """A model whose linears skip the channels that matter least, until `undo`; also a context manager.

    Attributes:
        report: settings and a row for each site: share, channels kept, multiplications and bytes a decoded token costs, dense and now.
        plan: the share of the channels that each site skips, a plan of kind "ratio"; give it as `allocation` to use it again.

    Example:
        >>> from whatmatters.infer import wina
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with wina(model, sparsity=0.5) as handle:
        ...     handle.active
        True
        >>> handle.active
        False
    """

    def __init__(self, report: Report, plan: Plan, gates: list[Gate], undo: contextlib.ExitStack) -> None:
        self.report = report
        self.plan = plan
        self._gates = gates
        self._undo = undo
        self._active = True

    @property
    def active(self) -> bool:
        """Whether the model is sparse now."""
        return self._active

    def undo(self) -> None:
        """Make the model what it was, bit for bit, layout of the weights included; a second call does nothing."""
        if self._active:
            self._active = False
            self._undo.close()
            give_memory_back()

    def __enter__(self) -> "SparseActivations":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def counts(self) -> list[dict[str, Any]]:
        """What was measured since the handle was made, a row for each site.

        Tokens that skipped (decoded one at a time), the share of the channels kept for them, and the tokens of dense or masked products,
        which save nothing.
        """
        return [
            {
                "site": gate.site.name,
                "tokens_skipping": gate.skipped,
                "kept_share": gate.kept / (gate.skipped * gate.site.shape[1]) if gate.skipped else None,
                "tokens_dense": gate.masked,
            }
            for gate in self._gates
        ]

    def costs(self) -> dict[str, int | float]:
        """Multiplications and bytes of one decoded token over all sites inside blocks, dense and now, by formula.

        Masks of more than one token save nothing and are not counted as savings. `reduction` is net of scores and rotations.
        """
        keys = ("macs_dense", "macs_sparse", "macs_overhead", "bytes_dense", "bytes_sparse")
        total: dict[str, int | float] = {key: sum(row[key] for row in self.report.rows) for key in keys}
        now = total["macs_sparse"] + total["macs_overhead"]
        return total | {"reduction": 1 - now / total["macs_dense"], "bytes_reduction": 1 - total["bytes_sparse"] / total["bytes_dense"]}


def _restore_forward(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = before


def _restore_layout(parameter: nn.Parameter, stride: tuple[int, ...]) -> None:
    with torch.no_grad():
        data = parameter.data
        parameter.data = torch.empty_strided(data.shape, stride, dtype=data.dtype, device=data.device).copy_(data)


@dataclass(frozen=True, eq=False)
class Gating:
    """How a method scores: everything that a gate needs beside the budget.

    Attributes:
        norms: from a site and its (rotated) weights to c, or to None for all one.
        rotations: Q by name of the site that it is made from, with all sites that read the same input; empty: none.
        signals: the module whose output is scored, by name of the site; empty: a site's own input.
    """

    norms: Callable[[Site, Tensor], Tensor | None]
    rotations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    signals: Mapping[str, str] = field(default_factory=dict)


def install(
    undo: contextlib.ExitStack, root: nn.Module, sites: Iterable[Site], gating: Gating, positions: Positions,
    kept: Mapping[str, int | float], *, name: str = "", skipping: bool = True,
) -> dict[str, Gate]:  # fmt: skip
    """Put gates into a model, or into a copy of one of its blocks; `undo` takes them out again.

    Args:
        undo: closed by the caller.
        root: the model, or the block.
        sites: the sites that get a gate, whole groups of those that share a rotation.
        gating: how they score.
        positions: what stays dense.
        kept: by site, channels to keep (int) or the smallest score to keep (float).
        name: name of `root` in the model whose names the sites have.
        skipping: lay the weights out so that channels can be skipped, in place of how they are; False for gates that only measure.
    """
    prefix = f"{name}." if name else ""
    by_name = {site.name: site for site in sites}
    rotations: dict[str, Rotation] = {}
    for lead, readers in gating.rotations.items():
        if lead in by_name:
            weight = _weight(root, by_name[lead], prefix)
            matrix = orthogonal_basis(weight)
            shared = Rotation(matrix.to(weight.dtype), len(readers))
            for reader in readers:
                rotations[reader] = shared
                _rotate(undo, _parameter(root, by_name[reader], prefix), matrix, by_name[reader].transposed)
    gates = {}
    for site in by_name.values():
        module = root if site.name == name else root.get_submodule(site.name.removeprefix(prefix))
        signal = None
        if site.name in gating.signals:
            signal = Signal()
            undo.callback(root.get_submodule(gating.signals[site.name].removeprefix(prefix)).register_forward_hook(signal.note).remove)
        value = kept[site.name]
        gate = Gate(
            site, module, module.forward, gating.norms(site, _weight(root, site, prefix)), value if isinstance(value, int) else None,
            value if isinstance(value, float) else None, positions, rotations.get(site.name), signal,
        )  # fmt: skip
        undo.callback(_restore_forward, module, module.__dict__.get("forward"))
        module.__dict__["forward"] = gate
        if skipping and gate.skips:
            _lay_out(undo, _parameter(root, site, prefix), site.transposed)
        gates[site.name] = gate
    return gates


def _parameter(root: nn.Module, site: Site, prefix: str) -> nn.Parameter:
    return root.get_parameter(site.parameter.removeprefix(prefix))


def _weight(root: nn.Module, site: Site, prefix: str) -> Tensor:
    weight = _parameter(root, site, prefix).detach()
    return weight.T if site.transposed else weight


def _lay_out(undo: contextlib.ExitStack, parameter: nn.Parameter, transposed: bool) -> None:
    """Make the weights of each channel contiguous; the memory of the former layout is given back."""
    rows = parameter.data if transposed else parameter.data.T
    if not rows.is_contiguous():
        undo.callback(_restore_layout, parameter, parameter.stride())
        rows = rows.contiguous()
        parameter.data = rows if transposed else rows.T


def orthogonal_basis(weight: Float[Tensor, "out d"]) -> Float[Tensor, "d d"]:
    """V of the singular value decomposition W = U S V', in float64: the columns of W V are orthogonal, their norms the singular values."""
    wide = weight.shape[0] < weight.shape[1]
    return torch.linalg.svd(weight.double(), full_matrices=wide).Vh.T.contiguous()


def _rotate(undo: contextlib.ExitStack, parameter: nn.Parameter, matrix: Float[Tensor, "d d"], transposed: bool) -> None:
    """W <- W Q. The weights as they were are kept, since rounding cannot be undone."""
    before = parameter.data
    rotated = ((before.T if transposed else before).double() @ matrix).to(before.dtype)
    undo.callback(setattr, parameter, "data", before)
    parameter.data = rotated.T.contiguous() if transposed else rotated


# Calibration


def bounds_of(
    model: nn.Module, calibration: Calibration, found: Structure, sites: list[Site], gating: Gating, positions: Positions,
    shares: Mapping[str, float], progress: Progress | None,
) -> dict[str, float]:  # fmt: skip
    """For every site the score below which a token's channel is skipped: the quantile of the scores over calibration tokens and channels.

    Raises:
        DataError: no calibration token is beyond the positions that stay dense.
    """
    bounds: dict[str, float] = {}

    def visit(block: Block) -> dict[str, Any]:
        own = [site for site in sites if site.block == block.name]
        counts = {site.name: torch.zeros(BINS, dtype=torch.int64) for site in own}
        with contextlib.ExitStack() as undo:
            whole = {site.name: site.shape[1] for site in own}  # nothing is skipped: the gates only see what goes in, rotated as it will be
            gates = install(undo, block.module, own, gating, positions, whole, name=block.name, skipping=False)
            for batch in block.batches():
                chosen = _beyond(batch.hidden, batch.valid, positions.prefix)

                def count(name: str, scores: Tensor) -> None:
                    counts[name] += _histogram(scores if chosen is None else scores[chosen])

                for gate in gates.values():
                    gate.watch = count
                block.run(batch)
        for name, cells in counts.items():
            if not int(cells.sum()):
                raise DataError(
                    f"no calibration token is beyond the first {positions.prefix}; give longer windows or a smaller dense_prefix"
                )
            bounds[name] = _quantile(cells, shares[name])
        return {}

    walk(model, calibration, visit, structure=found, settings={}, label="thresholds", commit=False, progress=progress)
    return bounds


def _beyond(hidden: Tensor, valid: Tensor | None, prefix: int) -> Tensor | None:
    """Which tokens of a batch are valid and beyond the dense prefix; None: all."""
    if hidden.dim() < 3:
        return None
    chosen = torch.ones(hidden.shape[:2], dtype=torch.bool) if valid is None else valid.clone()
    chosen[:, :prefix] = False
    return chosen.to(hidden.device)


def _histogram(scores: Float[Tensor, "*rows channels"]) -> Int64[Tensor, " bins"]:
    """How many scores are in each cell: the bits of numbers that are not negative are in the order of the numbers."""
    return torch.bincount((scores.contiguous().view(torch.int32) >> 12).reshape(-1), minlength=BINS).cpu()


def _edge(cell: int) -> float:
    return float(torch.tensor(cell << 12, dtype=torch.int32).view(torch.float32))


def _quantile(counts: Int64[Tensor, " bins"], share: float) -> float:
    """The smallest score to keep, so that `share` of the counted scores are below it; -inf for a share of 0."""
    if share <= 0:
        return -math.inf
    cumulated = counts.cumsum(0)
    wanted = share * int(cumulated[-1])
    cell = int(torch.searchsorted(cumulated, wanted, right=False))
    inside = (wanted - int(cumulated[cell]) + int(counts[cell])) / int(counts[cell])
    value = _edge(cell) + inside * (_edge(cell + 1) - _edge(cell))
    return float(torch.nextafter(torch.tensor(value), torch.tensor(math.inf)))  # a float32, so that every comparison is the same one


# The door that the methods share


def gated_sites(model: nn.Module, found: Structure, allow_uncovered: bool) -> tuple[list[Site], list[str]]:
    """The linears that can be gated, and notes on what stays dense.

    Raises:
        ModelError: experts or uncovered weights that were not allowed.
        NonFiniteError: a weight is NaN or infinite.
    """
    sites = [site for site in found.sites if site.index is None]
    experts = list(dict.fromkeys(site.parameter for site in found.sites if site.index is not None))
    left = [*experts, *found.uncovered]
    if left and not allow_uncovered:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise ModelError(f"{shown}: experts and other weights that are no linear of their own stay dense with allow_uncovered=True")
    if not sites:
        raise ModelError(f"{type(model).__name__} has no linear of its own to gate, only experts")
    for site in sites:
        if not torch.isfinite(site.view(model)).all():
            raise NonFiniteError(f"{site.name} holds NaN or infinity; repair the checkpoint")
    return sites, [f"stays dense (no linear of its own): {name}" for name in left]


def sparsify(
    slug: str, model: nn.Module, calibration: Calibration | None, *, gating: Callable[[Structure, list[Site]], Gating],
    shares: Callable[[Structure, list[Site], Gating, Positions], tuple[Plan, list[Site]]], mask_by: str, dense_prefix: int,
    settings: dict[str, Any], found: Structure | None, allow_uncovered: bool, progress: Progress | None,
) -> SparseActivations:  # fmt: skip
    """Check, allocate, calibrate and install: what all methods of sparse activation do.

    Args:
        slug: of the method.
        model: changed in place until the handle is undone.
        calibration: needed by thresholds.
        gating: how the method scores.
        shares: from structure, sites, gating and positions to a plan and the sites it is for.
        mask_by: "topk" or "threshold".
        dense_prefix: positions that stay dense.
        settings: for the report.
        found: structure, if at hand.
        allow_uncovered: leave weights dense that are no linear of their own.
        progress: told after each block.
    """
    if mask_by not in MASKS:
        raise InputError(f"mask_by is {mask_by!r:.40}; expected 'topk' or 'threshold'")
    if isinstance(dense_prefix, bool) or not isinstance(dense_prefix, int) or dense_prefix < 0:
        raise InputError(f"dense_prefix is {dense_prefix!r:.40}; expected a number of positions, 0 or more")
    if mask_by == "threshold" and calibration is None:
        raise DataError("mask_by='threshold' needs calibration data to find the thresholds; pass some as the second argument")
    if gates_of(model):
        raise ModelError("this model has sparse activations already; undo() the handle that it has first")
    found = structure(model) if found is None else found
    sites, notes = gated_sites(model, found, allow_uncovered)
    report = Report(slug, "infer", settings, notes=notes)
    with measured(report):
        how = gating(found, sites)
        positions = Positions(dense_prefix)
        plan, sites = shares(found, sites, how, positions)
        kept: dict[str, int | float] = {site.name: kept_channels(site.shape[1], float(plan.values[site.name])) for site in sites}
        if mask_by == "threshold" and calibration is not None:
            ratios = {site.name: float(plan.values[site.name]) for site in sites}
            kept = dict(bounds_of(model, calibration, found, sites, how, positions, ratios, progress))
        gates: list[Gate] = []
        undo = contextlib.ExitStack()
        try:
            if not getattr(model, "whatmatters_online", False):
                model.whatmatters_online = True  # type: ignore[assignment]
                undo.callback(delattr, model, "whatmatters_online")
            for block in track(found.blocks, "gates", len(found.blocks), progress):
                own = [site for site in sites if site.block == block]
                gates += install(undo, model, own, how, positions, kept).values()
            for watching in positions.watch(model, found.blocks):
                undo.callback(watching.remove)
            if any(face_for(site.view(model)) == "compiled" for site in sites):
                warm_up()
            give_memory_back()
        except BaseException:
            undo.close()
            raise
        report.rows = [_row(gate, float(plan.values[gate.site.name])) for gate in gates]
    return SparseActivations(report, plan, gates, undo)


def _row(gate: Gate, share: float) -> dict[str, Any]:
    """What a site costs a decoded token, by formula."""
    out, size = gate.site.shape
    weight: Any = gate.module.weight
    skips = gate.skips
    kept = gate.keep if gate.keep is not None else size * (1 - share)
    scoring = size if skips and gate.norms is not None else 0
    turning = size * size / gate.rotation.readers if gate.rotation is not None else 0
    extra = 4 * scoring + turning * weight.element_size()
    return {
        "site": gate.site.name,
        "sparsity": share,
        "kept": kept,
        "channels": size,
        "threshold": None if gate.bound is None or not math.isfinite(gate.bound) else gate.bound,
        "face": face_for(weight.T if gate.site.transposed else weight) if skips else "dense",
        "macs_dense": out * size,
        "macs_sparse": out * kept,
        "macs_overhead": scoring + turning,
        "bytes_dense": out * size * weight.element_size(),
        "bytes_sparse": out * kept * weight.element_size() + extra,
    }
