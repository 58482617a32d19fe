"""Parts of results from the library's own objects, against counting by hand."""

import math

import numpy as np
import pytest
import torch

from whatmatters.core.data import Calibration
from whatmatters.core.evaluate import Difference, Measurement
from whatmatters.core.sites import structure
from whatmatters.pages.build import arm_part, audit_results, average_bits, model_part, text_part
from whatmatters.pages.report import page
from whatmatters.pages.results import Results
from whatmatters.score.audit import audit
from whatmatters.testing.families import build, inputs


@pytest.fixture(scope="module")
def model():
    return build("llama")


def test_a_model_is_told_by_its_blocks_and_sites(model):
    found = structure(model)
    part = model_part("tiny", model, found)
    assert part.parameters == sum(p.numel() for p in model.parameters())
    assert [model.get_submodule(block) for block in part.blocks] == list(model.model.layers)
    assert {site.block for site in part.sites} == {0, 1}
    assert sum(site.size for site in part.sites) == sum(
        m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)
    )


def test_average_bits_count_scales(model):
    found = structure(model)
    names = [site.name for site in found.sites]
    assert average_bits({}, found, group_size=32) == 16
    sizes = {site.name: site.shape for site in found.sites}
    by_hand = sum(rows * columns * 4 + 16 * rows * (columns // 32) + 128 for rows, columns in sizes.values())
    total = sum(rows * columns for rows, columns in sizes.values())
    assert average_bits(dict.fromkeys(names, 4), found, group_size=32) == pytest.approx(by_hand / total, abs=1e-12)


def test_texts_are_counted():
    data = Calibration(
        torch.zeros(3, 4, dtype=torch.int64),
        torch.tensor([[1, 1, 1, 0]] * 3).bool(),
        torch.tensor([0, 0, 5]),
        start=torch.tensor([0, 4, 0]),
    )
    part = text_part("judging", "nowhere", data, "digest")
    assert (part.documents, part.windows, part.tokens) == (2, 3, 9)


def measurement(units):
    counts = np.full(units, 10)
    return Measurement(counts * 1.0, counts, counts, counts * 0.1, counts, np.arange(units), "document", "text")


def test_an_arm_has_no_interval_where_there_is_one_document():
    options = {"levels": {"a": 3}, "bits": 3.1, "bytes": 10}
    many = arm_part(
        "a", "A", "method", measured=measurement(5), difference=Difference(0.1, (0.05, 0.2), 0.95, 5, "document", 100), **options
    )
    assert many.change == pytest.approx(100 * (math.exp(0.1) - 1))
    assert (many.low, many.high) == pytest.approx((100 * (math.exp(0.05) - 1), 100 * (math.exp(0.2) - 1)))
    assert many.kl == pytest.approx(0.1)
    one = arm_part(
        "a", "A", "method", measured=measurement(1), difference=Difference(0.1, (-math.inf, math.inf), 0.95, 1, "window", 100), **options
    )
    assert one.low is one.high is None


def test_an_audit_alone_makes_a_page(model, tmp_path):
    ids = inputs("llama")
    data = Calibration.from_tensors(ids)
    found = audit(model, data, data, scorers=["magnitude", "random"], group_size=-1, steps=2, orders=1, resamples=100)
    results = audit_results("tiny", model, structure(model), found, ())
    results.save(tmp_path)
    assert Results.load(tmp_path) == results
    html = page(results)
    assert results.audit.verdict.split(",")[0][:40] in html
    assert len(results.audit.units) == len(found.units)
    assert [c.order for c in results.audit.curves].count("score") == 1
