"""Laws of Scores and of plans: what holds for all of them, whoever made them. Each raises AssertionError saying which law is broken."""

import copy
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whatmatters.core.formats import DENSE_BITS, stored_bits
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.testing.state import changes, state_of

__all__ = ["check_plan", "check_scores"]


def check_scores(scores: Scores) -> None:
    """Check everything that holds for Scores: finite, frozen, ranked by position among equals, the same from a file, lifted as they are.

    Args:
        scores: of any unit and scale.

    Raises:
        AssertionError: a law is broken; the message says which.

    Example:
        >>> check_scores(Scores("layer", {"h.0": torch.tensor(0.5), "h.1": torch.tensor(2.0)}, "mine"))
    """
    for name, value in scores.values.items():
        assert value.is_floating_point() and not value.requires_grad, f"scores of {name!r} are {value.dtype}, or carry a graph"
        assert bool(torch.isfinite(value).all()), f"scores of {name!r} are not finite"
    _frozen(scores)
    _same_from_a_file(scores, Scores.load)
    _same(scores, copy.deepcopy(scores), "a deep copy")
    flat, order = _flat(scores.stakes())
    _ranks(scores, flat, order)
    _top(scores, flat)
    if scores.scale == "loss":
        assert list(scores.levels) == sorted(set(scores.levels)), "levels of a loss table rise"
        assert all(len(value) == len(scores.levels) for value in scores.values.values()), "a loss for every level"
    elif scores.unit == "layer":
        assert scores.order() == [name for name, _, _ in scores.top(len(scores.values))], "`order` and `top` agree"
    if scores.scale == "rank" and bool(flat.isfinite().all()) and float(flat.abs().sum()) > 0:
        _normalized(scores)
    if scores.unit == "layer" and scores.structure is not None:
        _lifted(scores)


def _flat(scores: Scores) -> tuple[Tensor, Tensor]:
    """All units in one vector, padding left out, and their order: most important first, of equals the earlier."""
    flat = torch.cat([(value if scores.valid is None else value[scores.valid[name]]).reshape(-1) for name, value in scores.values.items()])
    return flat, flat.sort(descending=True, stable=True).indices


def _ranks(scores: Scores, flat: Tensor, order: Tensor) -> None:
    ranks, _ = _flat(scores.rank())
    count = len(flat)
    expected = torch.empty(count, dtype=torch.float64)
    expected[order] = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    assert torch.equal(ranks.double(), expected), "ranks are 0 to n - 1 in the order of the scores; of equals the later has the lower"
    scaled = {name: value * 4 for name, value in scores.values.items()}  # a power of two: no rounding makes or breaks ties
    if all(torch.isfinite(value).all() and torch.equal(value / 4, scores.values[name]) for name, value in scaled.items()):
        again = dataclasses.replace(scores, values=scaled).rank()
        assert all(torch.equal(again.values[name], value) for name, value in scores.rank().values.items()), (
            "an increasing map changes no rank"
        )


def _top(scores: Scores, flat: Tensor) -> None:
    count = len(flat)
    ranks = scores.rank().values
    for k in {0, 1, count // 2, count} if count <= 10_000 else {0, 1}:
        top = scores.top(k)
        assert [int(ranks[name][index]) for name, index, _ in top] == list(range(count - 1, count - 1 - k, -1)), (
            f"top({k}) are the highest ranks"
        )


def _normalized(scores: Scores) -> None:
    normalized, _ = _flat(scores.normalized("minmax"))
    flat, _ = _flat(scores)
    spread = float(flat.double().max() - flat.double().min())
    assert float(normalized.min()) == 0 and float(normalized.max()) <= 1 + 1e-6, "minmax goes from 0 to 1"
    step = normalized[flat.sort(stable=True).indices].diff()
    assert spread == 0 or bool((step >= -1e-6).all()), "normalizing keeps the order"


def _lifted(scores: Scores) -> None:
    structure = scores.structure
    assert structure is not None
    covered = {site.block for site in structure.sites} | {site.name for site in structure.sites}
    if not all(site.name in scores.values or site.block in scores.values for site in structure.sites) or not covered:
        return
    lifted = scores.lift(structure)
    assert list(lifted.values) == [site.name for site in structure.sites], "lifted scores name the sites in their order"
    for block in structure.blocks:
        if block not in scores.values or any(site.name in scores.values for site in structure.in_block(block)):
            continue
        parts = [lifted.values[site.name].double() for site in structure.in_block(block)]
        if scores.scale == "loss" and parts:
            assert torch.allclose(torch.stack(parts).sum(0), scores.values[block].double(), rtol=1e-5, atol=1e-8), (
                "lifting keeps a block's loss"
            )
        assert scores.scale == "loss" or all(float(part) == float(scores.values[block]) for part in parts), "a site has its block's score"


def check_plan(plan: Plan, scores: Scores | None = None) -> None:
    """Check everything that holds for plans: frozen, the same from a file, within the budget, nothing left that would have fitted.

    Args:
        plan: of any kind.
        scores: what it was made from; then also that more important units got no less.

    Raises:
        AssertionError: a law is broken; the message says which.

    Example:
        >>> from whatmatters.core.allocation import masks
        >>> scores = Scores("weight", {"a": torch.tensor([[3.0, 1.0, 2.0, 4.0]])}, "mine", {})
        >>> check_plan(masks(scores, 0.5), scores)
    """
    _frozen(plan)
    _same_from_a_file(plan, Plan.load)
    _same(plan, copy.deepcopy(plan), "a deep copy")
    {"bits": _bits, "mask": _masks, "ratio": _ratios, "sampling": _sampling}[plan.kind](plan, scores)


def _bits(plan: Plan, scores: Scores | None) -> None:
    values = {name: int(value) for name, value in plan.values.items()}
    account, structure = plan.account, plan.structure
    if account.get("unused") is not None:
        assert account["unused"] >= 0, "the budget is exceeded"
        step = account.get("smallest_step")
        assert step is None or plan.budget.get("average_bits") is None or account["unused"] < step, "something that fits was left out"
    if structure is None:
        return
    shapes = {site.name: site.shape for site in structure.sites}
    sizes = {site.name: site.size for site in structure.sites}
    assert list(values) == list(shapes), "a plan of bits names every site, in their order"
    average = plan.budget.get("average_bits")
    count = plan.budget.get("count")
    if average is not None and count in ("stored", "codes"):
        cost = {
            name: stored_bits(shapes[name], level, **_grid(plan)) if count == "stored" else sizes[name] * min(level, DENSE_BITS)
            for name, level in values.items()
        }
        assert sum(cost.values()) <= Fraction(str(average)) * sum(sizes.values()), f"more than {average} bits a weight, counted anew"
        assert sum(cost.values()) == account["used"], "the account says other bits than are used, counted anew"
    if plan.settings.get("tied"):
        for group in structure.groups():
            assert len({values[name] for name in group}) == 1, f"sites that read the same input have unequal bits: {group}"
    if scores is not None and plan.settings.get("how") == "rank":
        _no_less_for_more(plan, scores, values)


def _grid(plan: Plan) -> dict[str, Any]:
    return {name: plan.settings[name] for name in ("group_size", "symmetric") if name in plan.settings}


def _no_less_for_more(plan: Plan, scores: Scores, values: Mapping[str, int]) -> None:
    """Of two blocks or sites that were groups of their own the more important has no fewer bits, unless it was raised at the end."""
    assert plan.structure is not None
    filled = set(plan.account.get("filled", ()))
    stakes = scores.stakes().values
    groups = {name: [site.name for site in plan.structure.in_block(name)] or [name] for name in stakes}
    alone = {name: members for name, members in groups.items() if members and not filled & set(members)}
    if any(len(group) > 1 for group in plan.structure.groups()) and not all(name in plan.structure.blocks for name in stakes):
        return  # tied sites share the mean of their ranks, so single sites say nothing
    ordered = sorted(alone, key=lambda name: float(stakes[name]))
    for less, more in itertools.pairwise(ordered):
        if float(stakes[less]) < float(stakes[more]):
            assert values[groups[less][0]] <= values[groups[more][0]], f"{more} matters more than {less} and got fewer bits"


def _masks(plan: Plan, scores: Scores | None) -> None:
    masks = {name: value for name, value in plan.values.items() if isinstance(value, Tensor)}
    total, kept = sum(mask.numel() for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values())
    if "sparsity" not in plan.budget:
        return
    share = 1 - Fraction(str(plan.budget["sparsity"]))
    scope = str(plan.budget.get("scope", "all"))
    assert kept <= share * total, f"{kept} of {total} are kept, more than {float(share):g}"
    assert kept == plan.account["kept"], "the account says another number of weights that are kept"
    for name, mask in masks.items():
        parts = [mask.reshape(1, -1)] if scope == "site" else [mask] if scope == "row" else []
        if ":" in scope:
            parts = [mask.reshape(-1, int(scope.partition(":")[2]))]
        for part in parts:
            wanted = math.floor(share * part.shape[1])
            assert bool((part.sum(1) == wanted).all()), f"{name}: not exactly {wanted} of {part.shape[1]} are kept where weights compete"
    if scores is None:
        return
    pairs = [(scores.values[name].double(), mask) for name, mask in masks.items()]
    if scope == "all":
        pairs = [(torch.cat([s.reshape(-1) for s, _ in pairs])[None], torch.cat([m.reshape(-1) for _, m in pairs])[None])]
    elif scope == "site":
        pairs = [(s.reshape(1, -1), m.reshape(1, -1)) for s, m in pairs]
    elif ":" in scope:
        of = int(scope.partition(":")[2])
        pairs = [(s.reshape(-1, of), m.reshape(-1, of)) for s, m in pairs]
    for value, mask in pairs:
        least, most = value.masked_fill(~mask, math.inf).amin(1), value.masked_fill(mask, -math.inf).amax(1)
        assert bool((least >= most).all()), "a weight is kept that matters less than one that goes"
        ties = (value == least[:, None]) & (least == most)[:, None]
        late = ties & mask & ((ties & ~mask).int().cumsum(1) > 0)
        assert not bool(late.any()), "of equal weights the earlier are kept"


def _ratios(plan: Plan, scores: Scores | None) -> None:
    structure = plan.structure
    if structure is None or "sparsity" not in plan.budget:
        return
    sizes = {site.name: site.size for site in structure.sites}
    assert list(plan.values) == list(sizes), "a plan of ratios names every site, in their order"
    counts = {name: float(value) * sizes[name] for name, value in plan.values.items()}
    assert all(abs(count - round(count)) < 1e-6 for count in counts.values()), "ratios stand for whole numbers of weights"
    pruned = sum(round(count) for count in counts.values())
    wanted = math.ceil(Fraction(str(plan.budget["sparsity"])) * sum(sizes.values()))
    assert pruned == wanted == plan.account["pruned"], f"{pruned} weights go; expected exactly {wanted}"
    for name, value in plan.values.items():
        slack = 1 / sizes[name]
        assert plan.budget.get("floor", 0) - slack <= float(value) <= plan.budget.get("cap", 1) + slack, f"{name} is beyond floor or cap"
    if scores is not None:
        lifted = {name: float(value) for name, value in scores.lift(structure).stakes().values.items()}
        ordered = sorted(lifted, key=lambda name: lifted[name])
        for less, more in itertools.pairwise(ordered):
            if lifted[less] < lifted[more]:
                room = 1 / min(sizes[less], sizes[more])
                assert float(plan.values[more]) <= float(plan.values[less]) + room, (
                    f"more of {more} goes than of {less}, which matters less"
                )


def _sampling(plan: Plan, scores: Scores | None) -> None:
    total = math.fsum(float(value.sum(dtype=torch.float64)) for value in plan.values.values() if isinstance(value, Tensor))
    if "units" in plan.budget:
        assert abs(total - plan.budget["units"]) <= 1e-6 * max(1, plan.budget["units"]), (
            f"probabilities add up to {total}, not to the budget"
        )
    if scores is None:
        return
    shares = torch.cat([value.reshape(-1) for value in plan.values.values() if isinstance(value, Tensor)])
    padding = torch.cat([torch.zeros(v.numel(), dtype=torch.bool) if scores.valid is None else ~scores.valid[n].reshape(-1)
                         for n, v in scores.values.items()])  # fmt: skip
    assert not bool(shares[padding].any()), "padding has a probability"
    flat = torch.cat([value.reshape(-1) for value in scores.values.values()])[~padding]
    assert bool((shares[~padding][flat.sort().indices].diff() >= -1e-9).all()), "a more important unit has a lower probability"


def _frozen(value: Scores | Plan) -> None:
    frozen: Any = value.values
    for attempt in (lambda: setattr(value, "method", "other"), lambda: frozen.__setitem__("other", 1)):
        try:
            attempt()
        except (TypeError, AttributeError):
            continue
        raise AssertionError(f"{type(value).__name__} can be changed; they are frozen")


def _same(first: Scores | Plan, second: Scores | Plan, what: str) -> None:
    told = [state_of({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}) for value in (first, second)]
    differing = changes(*told)
    assert not differing, f"{what} differs in {differing[:3]}"


def _same_from_a_file(value: Scores | Plan, load: Callable[..., Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        value.save(path)
        first = path.read_bytes()
        _same(value, load(path), "what was saved and loaded")
        _same(value, load(path, mmap=True), "what was saved and mapped")
        value.save(path)
        assert path.read_bytes() == first, "saved twice, the bytes differ"
