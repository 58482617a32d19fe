"""What experiments share: splits that share no document, arms measured once, claims over draws and documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from whatmatters.core import embedded
from whatmatters.core.errors import InputError
from whatmatters.reproduce import _desk
from whatmatters.reproduce._desk import (
    Arms,
    Measured,
    Sizes,
    Subject,
    change,
    check_seeds,
    compared,
    difference,
    pooled,
    shuffles,
    subjects,
)

SIZES = {"embedded": Sizes(2, 16, 4, 1)}


@pytest.fixture(scope="module")
def subject() -> Subject:
    found, notes = subjects(SIZES, model=None, scale="smoke")
    assert notes == []
    return found[0]


def measured(*nats: float, counts: int = 10) -> Measured:
    return Measured(np.array(nats), np.full(len(nats), counts, dtype=np.int64), 0.0, {})


def test_untrained_subject_is_the_same_each_time_and_leaves_the_generator(subject: Subject) -> None:
    state = torch.random.get_rng_state()
    again = subjects(SIZES, model=None, scale="smoke")[0][0]
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(subject.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(subject.calibration(1).inputs, again.calibration(1).inputs)
    assert not torch.equal(subject.calibration(0).inputs, subject.calibration(1).inputs)


def test_splits_share_no_document_and_no_training_text(subject: Subject) -> None:
    splits = [set(subject.texts[name]) for name in ("calibration", "validation", "test")]
    assert all(not a & b for i, a in enumerate(splits) for b in splits[i + 1 :])
    assert not set().union(*splits) & set(embedded.documents("train"))
    assert len(subject.windows("test").document.unique()) == 4


def test_stories_are_found_in_the_shared_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (data / "stories260k" / "hf").is_dir():
        pytest.skip("no stories260k in the shared data")
    monkeypatch.setenv("WHATMATTERS_DATA", str(data))
    found, notes = subjects({**SIZES, "stories": Sizes(2, 16, 4, 1)}, model=None, scale="desk")
    assert [s.name for s in found] == ["stories260k", "pylib-lm"]
    assert notes == []
    splits = [set(found[0].texts[name]) for name in ("calibration", "validation", "test")]
    assert all(not a & b for i, a in enumerate(splits) for b in splits[i + 1 :])


def test_absent_data_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WHATMATTERS_DATA", str(tmp_path))
    found, notes = subjects(SIZES, model=None, scale="desk")
    assert [s.name for s in found] == ["pylib-lm"]
    assert "stories260k was skipped" in notes[0]


def test_a_named_model_gets_the_text_it_predicts_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WHATMATTERS_DATA", str(tmp_path / "none"))
    found, _ = subjects({**SIZES, "public": Sizes(2, 16, 4, 1)}, model=embedded.path(), scale="desk")
    assert (found[-1].tier, found[-1].about) == ("public", {"text": "standard library"})


def test_a_named_model_of_stories_is_judged_on_stories(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data / "stories260k" / "hf"
    if not folder.is_dir():
        pytest.skip("no stories260k in the shared data")
    monkeypatch.setenv("WHATMATTERS_DATA", str(data))
    sizes = {**SIZES, "stories": Sizes(2, 16, 4, 1), "public": Sizes(2, 16, 4, 1)}
    found, _ = subjects(sizes, model=folder, scale="desk")
    assert found[-1].about == {"text": "tinystories"}


def test_arms_are_made_once_and_found_again(subject: Subject, tmp_path: Path) -> None:
    made: list[str] = []

    def make(model: nn.Module) -> dict[str, Any]:
        made.append("arm")
        with torch.no_grad():
            next(model.parameters()).zero_()
        return {"fact": 1}

    text = subject.windows("test")
    arms = Arms(tmp_path / "kept", "code")
    first = arms.measure(subject, ["a", 1], make, text)
    assert arms.measure(subject, ["a", 1], make, text) is first
    later = Arms(tmp_path / "kept", "code")
    again = later.measure(subject, ["a", 1], make, text)
    assert (arms.account()["kept_from_an_earlier_start"], later.account()["kept_from_an_earlier_start"]) == (0, 1)
    assert later.account()["processor_seconds"] == arms.account()["processor_seconds"]
    assert np.array_equal(again.nats, first.nats)
    assert again.facts == {"fact": 1}
    assert made == ["arm"]
    assert float(next(subject.model.parameters()).detach().abs().sum()) > 0  # a copy was changed
    Arms(tmp_path / "kept", "code").measure(subject, ["a", 2], make, text)
    Arms(tmp_path / "kept", "other code").measure(subject, ["a", 1], make, text)
    Arms(None, "code").measure(subject, ["a", 1], make, text)
    assert made == ["arm"] * 4
    assert all(json.loads(path.read_text())[0]["facts"] == {"fact": 1} for path in (tmp_path / "kept").iterdir())


def test_differences_are_token_weighted_and_paired() -> None:
    a, b = measured(10.0, 20.0), measured(11.0, 22.0)
    effect, low, high = difference(a, b)
    assert effect == pytest.approx(3 / 20)
    assert low >= 0.1 - 1e-12  # whichever documents are drawn, each is worse by 0.1 or 0.2 a token
    assert high <= 0.2 + 1e-12
    assert change(a, b)["change_percent"] == pytest.approx(100 * np.expm1(0.15))


def test_pooled_is_the_mean_over_draws() -> None:
    both = pooled([measured(1.0, 2.0), measured(3.0, 6.0)])
    assert both.nats.tolist() == [2.0, 4.0]
    assert both.loss == pytest.approx(6 / 20)


def test_compared_judges_draws_and_documents() -> None:
    base = [measured(10.0, 20.0, 30.0)] * 3
    better = [measured(9.0, 19.0, 29.0), measured(9.1, 19.1, 29.1), measured(8.9, 18.9, 28.9)]
    claims = compared("b is below a", "desk", base, better)
    assert [claim.verdict for claim in claims] == ["shown", "shown"]
    assert [claim.effect for claim in claims] == pytest.approx([-0.1, -0.1])
    assert [claim.verdict for claim in compared("b is below a", "desk", better, base)] == ["refuted", "refuted"]
    # Good on the mean, but one document tells another story: only the documents say so.
    mixed = [measured(5.0, 19.0, 32.0)] * 3
    assert [claim.verdict for claim in compared("b is below a", "desk", base, mixed)] == ["shown", "inconclusive"]


def test_orders() -> None:
    drawn, everyone = shuffles(list("abcd"), 5)
    assert len(everyone) == 24
    assert all(order in everyone for order in drawn)
    assert shuffles(list("abcd"), 5)[0] == drawn
    drawn, population = shuffles([str(i) for i in range(7)], 5)  # 5,040 orders are too many
    assert population is drawn


@pytest.mark.parametrize("seeds", [0, 2, -1, True])
def test_too_few_seeds(seeds: int) -> None:
    with pytest.raises(InputError, match="at least 3"):
        check_seeds(seeds)


def test_shared_data_needs_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WHATMATTERS_DATA", str(tmp_path / "none"))
    assert _desk.shared_data() is None
    monkeypatch.setenv("WHATMATTERS_DATA", str(tmp_path))
    assert _desk.shared_data() == tmp_path
