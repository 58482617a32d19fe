"""Scores and plans go through copy and pickle unchanged."""

import copy
import pickle

import torch

from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.testing.families import build


def test_scores_and_plans_are_copied_and_pickled_whole() -> None:
    found = structure(build("llama"))
    names = [site.name for site in found.sites]
    settings = {"levels": [2, 4], "deep": {"a": [1, {"b": None}]}}
    scores = Scores("layer", {n: torch.tensor([2.0, 1.0 / (i + 1)]) for i, n in enumerate(names)}, "mine", settings, "loss", found)
    plan = Plan("bits", dict.fromkeys(names, 4), {"average_bits": 4, "parts": [1, 2]}, {"achieved": 4.0}, "mine", settings, found)
    for make in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        twin = make(scores)
        assert (twin.unit, twin.method, twin.settings, twin.scale, twin.structure) == ("layer", "mine", scores.settings, "loss", found)
        assert all(torch.equal(twin.values[n], scores.values[n]) for n in names)
        other = make(plan)
        assert (other.values, other.budget, other.account, other.structure) == (plan.values, plan.budget, plan.account, found)
