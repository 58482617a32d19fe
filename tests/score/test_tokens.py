"""Token scores: closed forms, the library's own attention maps, brute force, and the map from scores to weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from whatmatters.core.catalog import scorers
from whatmatters.core.data import Calibration, call_model
from whatmatters.core.errors import InputError, InputTypeError, ModelError, NonFiniteError, UnknownNameError
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.core.walk import Block, walk
from whatmatters.score.tokens import (
    TokenContext,
    activation_change,
    activation_norm,
    cluster_distance,
    dot_product,
    first_last_n,
    first_n,
    mean_one,
    normalize_importance,
    resolve_token_scores,
    score_tokens,
    token_contexts,
    token_frequencies,
    token_frequency,
    token_similarity,
)
from whatmatters.testing.families import build, inputs

EAGER = ["llama", "qwen3", "gpt2", "mixtral"]


def vectors(samples: int = 3, length: int = 9, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(samples, length, d, generator=torch.Generator().manual_seed(seed))


def padded(samples: int = 3, length: int = 9) -> Tensor:
    valid = torch.ones(samples, length, dtype=torch.bool)
    valid[1, 5:] = False
    valid[2, :2] = False
    return valid


def context(x: Tensor, valid: Tensor | None = None, y: Tensor | None = None, ids: Tensor | None = None) -> TokenContext:
    ids = torch.zeros(x.shape[:2], dtype=torch.int64) if ids is None else ids
    return TokenContext("h.0", 0, ids, x, valid, None, None if y is None else lambda attention: (y, None))


# ---- attention concentration


@pytest.mark.parametrize("family", EAGER)
def test_attention_concentration_is_the_column_sum_of_the_eager_maps(family: str) -> None:
    model, ids = build(family), inputs(family, samples=3, length=12)
    scores = score_tokens(model, Calibration.from_tensors(ids, batch=2))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    for block, attention in zip(structure(model).blocks, maps, strict=True):
        torch.testing.assert_close(scores.values[block], attention.double().sum((1, 2)).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EAGER)
@pytest.mark.parametrize("left", [False, True])
def test_padding_neither_attends_nor_is_attended_to(family: str, left: bool) -> None:
    model, ids = build(family), inputs(family, samples=2, length=12)
    valid = torch.ones_like(ids, dtype=torch.bool)
    if left:
        valid[1, :5] = False
    else:
        valid[1, 7:] = False
    values = score_tokens(model, Calibration.from_tensors(ids, valid, batch=2)).values
    alone = score_tokens(model, Calibration.from_tensors(ids[1:][valid[1:]][None])).values
    for block, value in values.items():
        assert (value[~valid] == 0).all()
        assert value[1].sum().item() == pytest.approx(4 * 7, rel=1e-5)
        if not left:  # on the left, positions of the learned kind (GPT-2) differ from those of the text alone
            torch.testing.assert_close(value[1, :7], alone[block][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EAGER)
def test_attention_adds_up_to_heads_times_tokens(family: str) -> None:
    ids = inputs(family, samples=3, length=17)
    for value in score_tokens(build(family), Calibration.from_tensors(ids, batch=2)).values.values():
        torch.testing.assert_close(value.sum(1), torch.full((3,), 4 * 17.0))


def test_uniform_causal_attention_has_its_closed_form() -> None:
    model, length = build("llama"), 11
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    expected = 4 * np.cumsum(1 / np.arange(1, length + 1)[::-1])[::-1]
    for value in score_tokens(model, Calibration.from_tensors(inputs("llama", samples=1, length=length))).values.values():
        np.testing.assert_allclose(value[0].numpy(), expected, rtol=1e-5)
        assert (value[0].diff() < 0).all()


def test_plain_models_have_no_attention() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ModelError, match="no attention"):
        score_tokens(model, Calibration.from_tensors(vectors()))


def test_inputs_that_are_no_sequences_are_refused() -> None:
    with pytest.raises(ModelError, match="samples, length, d"):
        score_tokens(build("sequential"), Calibration.from_tensors(inputs("sequential")), "activation-norm")


# ---- the other scores against brute force


@pytest.mark.parametrize("valid", [None, padded()])
def test_similarity_distance_and_products_against_loops(valid: Tensor | None) -> None:
    x = vectors() + 100  # far from the origin, where a careless formula cancels
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
    similar, product = token_similarity(context(x, valid)), dot_product(context(x, valid))
    for row in range(len(x)):
        members = x[row][mask[row]].double()
        for t in mask[row].nonzero()[:, 0].tolist():
            own = x[row, t].double()
            distances = [float((own - other).square().sum()) for other in members]
            assert similar[row, t].item() == pytest.approx(float(np.mean(distances)), rel=1e-9)
            assert product[row, t].item() == pytest.approx(sum(float(own @ other) for other in members), rel=1e-9)


def test_norm_and_change_against_numpy() -> None:
    x, y = vectors(), vectors(seed=1)
    np.testing.assert_allclose(activation_norm(context(x)).numpy(), np.linalg.norm(x.numpy(), axis=-1), rtol=1e-6)
    np.testing.assert_allclose(activation_change(context(x, y=y)).numpy(), -np.linalg.norm((x - y).numpy(), axis=-1), rtol=1e-6)
    with pytest.raises(ModelError, match="change is undefined"):
        activation_change(context(x, y=y[..., :2]))


def test_first_and_last_tokens() -> None:
    x = vectors(2, 16)
    assert first_n(context(x)).sum(1).tolist() == [2, 2]
    assert first_n(context(x))[0].tolist() == [1, 1] + [0] * 14
    assert first_n(context(vectors(1, 5)))[0].tolist() == [1, 0, 0, 0, 0]
    assert first_last_n(context(x), share=1 / 8)[0].tolist() == [1, 1] + [0] * 12 + [1, 1]
    valid = padded(3, 9)
    assert first_n(context(vectors(), valid), share=0.4).tolist()[2] == [0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert first_last_n(context(vectors(), valid), share=0.4).tolist()[1] == [1, 1, 0, 1, 1, 0, 0, 0, 0]
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="share"):
            first_n(context(x), share=share)


def test_rare_tokens_score_higher_and_stay_aligned() -> None:
    ids = torch.tensor([[3, 3, 1], [2, 3, 0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    counts = token_frequencies(Calibration.from_tensors(ids, valid))
    assert counts is not None
    assert counts.tolist() == [0, 1, 1, 3]
    scores = token_frequency(TokenContext("h.0", 0, ids, torch.ones(2, 3, 2), valid, counts))
    assert scores.tolist() == [[-3, -3, -1], [-1, -3, 0]]
    assert token_frequencies(Calibration.from_tensors(torch.ones(2, 3, 4))) is None
    with pytest.raises(InputError, match="token ids"):
        token_frequency(context(vectors()))


def test_clusters_find_the_stray_token_and_are_seeded() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    x = centers.repeat_interleave(20, 0) + torch.randn(40, 2, generator=generator) * 0.1
    x = torch.cat([x, torch.tensor([[0.0, 8.0]])])[None]
    found = [cluster_distance(context(x), tokens_per_cluster=20, seed=seed) for seed in (0, 0)]
    assert torch.equal(*found)
    assert found[0][0].argmax() == 40
    exact = cluster_distance(context(vectors(1, 6)), tokens_per_cluster=1)
    assert torch.allclose(exact, torch.zeros_like(exact), atol=1e-12)
    mean = cluster_distance(context(vectors(1, 6)), tokens_per_cluster=6)[0]
    x = vectors(1, 6)[0].double()
    torch.testing.assert_close(mean, (x - x.mean(0)).square().sum(1))
    with pytest.raises(InputError, match="at least 1"):
        cluster_distance(context(vectors()), steps=0)


@pytest.mark.parametrize("entry", [e for e in scorers("token", "walk") if e.slug != "attention-concentration"], ids=lambda e: e.slug)
def test_what_is_at_padding_changes_nothing(entry: object) -> None:
    x, y, valid = vectors(), vectors(seed=2), padded()
    ids = torch.arange(27).view(3, 9) % 5
    counts = torch.bincount(ids[valid], minlength=5)
    other_x, other_y, other_ids = x.clone(), y.clone(), ids.clone()
    other_x[~valid], other_y[~valid], other_ids[~valid] = 1e3, -1e3, 4
    one = entry.function(TokenContext("h.0", 0, ids, x, valid, counts, lambda attention: (y, None)))  # type: ignore[attr-defined]
    two = entry.function(TokenContext("h.0", 0, other_ids, other_x, valid, counts, lambda attention: (other_y, None)))  # type: ignore[attr-defined]
    torch.testing.assert_close(one[valid], two[valid])


# ---- contexts and resolving


def test_contexts_show_what_the_block_is_given_and_gives() -> None:
    model, ids = build("llama"), inputs("llama", samples=5, length=8)
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def visit(block: Block) -> dict[str, str]:
        seen[block.name] = [(c.first, c.inputs, c.outputs) for c in token_contexts(block)]
        return {}

    walk(model, Calibration.from_tensors(ids, batch=2), visit, structure=structure(model), settings={}, commit=False)
    with torch.no_grad():
        states = call_model(model.model, ids).last_hidden_state
    assert [first for first, _, _ in seen["model.layers.1"]] == [0, 2, 4]
    last = torch.cat([y for _, _, y in seen["model.layers.1"]])
    torch.testing.assert_close(model.model.norm(last), states)
    assert torch.equal(torch.cat([y for _, _, y in seen["model.layers.0"]]), torch.cat([x for _, x, _ in seen["model.layers.1"]]))


def test_names_functions_and_scores_resolve_to_the_same() -> None:
    model, data = build("llama"), Calibration.from_tensors(inputs("llama", samples=5, length=8), batch=2)
    saved = score_tokens(model, data, "activation-norm")
    assert saved.unit == "token"
    assert saved.method == "activation-norm"
    again = [score_tokens(model, data, spec) for spec in ("activation_norm", activation_norm)]
    again.append(score_tokens(model, data, resolve_token_scores(saved)))
    for other in again:
        assert all(torch.equal(other.values[block], saved.values[block]) for block in saved.values)


def test_bad_token_scores_are_refused() -> None:
    one = context(vectors())
    with pytest.raises(UnknownNameError, match="attention-concentration"):
        resolve_token_scores("nonsense")
    with pytest.raises(InputTypeError, match="unit 'layer'"):
        resolve_token_scores(Scores("layer", {"h.0": torch.tensor(1.0)}, "mine", {}))
    with pytest.raises(InputError, match=r"expected \(3, 9\)"):
        resolve_token_scores(lambda c: torch.ones(3))(one)
    with pytest.raises(InputTypeError, match="floating point"):
        resolve_token_scores(lambda c: [1.0])(one)
    with pytest.raises(NonFiniteError, match=r"h\.0"):
        resolve_token_scores(lambda c: torch.full(c.shape, torch.nan))(one)
    with pytest.raises(InputError, match=r"nothing for h\.0"):
        resolve_token_scores(Scores("token", {"h.1": torch.ones(3, 9)}, "mine", {}))(one)
    with pytest.raises(InputError, match="same calibration data"):
        resolve_token_scores(Scores("token", {"h.0": torch.ones(2, 9)}, "mine", {}))(one)
    # at padding an answer may be anything
    resolve_token_scores(lambda c: torch.where(c.tokens, 1.0, torch.nan))(context(vectors(), padded()))
    with pytest.raises(InputError, match="token_contexts"):
        _ = one.outputs


# ---- from scores to weights


def test_the_lowest_gets_r_min_and_the_highest_r_max() -> None:
    weights = normalize_importance(torch.tensor([[1.0, 5.0, 3.0], [0.0, 0.0, 2.0]]), r_min=0.01, r_max=2)
    np.testing.assert_allclose(weights.numpy(), [[0.01, 2, 1.005], [0.01, 0.01, 2]])


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=20), st.floats(0.001, 100), st.floats(-1e3, 1e3))
@settings(max_examples=60, deadline=None)
def test_weights_do_not_see_the_scale_and_shift_of_scores(values: list[float], a: float, b: float) -> None:
    s = torch.tensor([values], dtype=torch.float64)
    weights = normalize_importance(s, r_min=0.1)
    assert (weights >= 0.1).all()
    assert (weights <= 1).all()
    if s.max() - s.min() > 1e-3 * s.abs().max().clamp(min=1):
        torch.testing.assert_close(weights, normalize_importance(a * s + b, r_min=0.1), rtol=1e-6, atol=1e-6)
        assert weights.max() == 1


@pytest.mark.parametrize("options", [{}, {"bins": 3}, {"mask_lowest": 0.5}, {"quantile": 0.9}, {"power": 2}, {"scale": "sqrt"}])
def test_constant_scores_and_single_tokens_give_ones(options: dict[str, object]) -> None:
    assert torch.equal(normalize_importance(torch.full((2, 5), 7.0), **options), torch.ones(2, 5, dtype=torch.float64))  # type: ignore[arg-type]
    assert torch.equal(normalize_importance(torch.tensor([[3.0]]), **options), torch.ones(1, 1, dtype=torch.float64))  # type: ignore[arg-type]


def test_padding_gets_nothing_and_says_nothing() -> None:
    s = torch.tensor([[1.0, 2.0, 3.0, 1e9], [-1e9, 4.0, 8.0, 6.0]])
    valid = torch.tensor([[True, True, True, False], [False, True, True, True]])
    weights = normalize_importance(s, valid=valid, r_min=0.5)
    np.testing.assert_allclose(weights.numpy(), [[0.5, 0.75, 1, 0], [0, 0.5, 1, 0.75]])
    balanced = mean_one(weights, valid)
    np.testing.assert_allclose(balanced.sum(1).numpy(), [3, 3])
    assert (balanced[~valid] == 0).all()
    np.testing.assert_allclose((balanced / weights)[valid].view(2, 3).std(1).numpy(), [0, 0], atol=1e-12)


def test_options_do_what_the_official_code_does() -> None:
    s = torch.tensor([[4.0, 9.0, 1.0, 16.0]])
    np.testing.assert_allclose(
        normalize_importance(s, r_min=0, scale="sqrt"), normalize_importance(torch.tensor([[2.0, 3, 1, 4]]), r_min=0)
    )
    np.testing.assert_allclose(normalize_importance(s, r_min=0, scale="square"), normalize_importance(s.square(), r_min=0))
    seen_by = torch.tensor([4.0, 3, 2, 1])
    np.testing.assert_allclose(normalize_importance(s, position_norm="linear"), normalize_importance(s / seen_by), rtol=1e-6)
    np.testing.assert_allclose(normalize_importance(s, position_norm="sqrt"), normalize_importance(s / seen_by.sqrt()), rtol=1e-6)
    np.testing.assert_allclose(normalize_importance(s, power=2), normalize_importance(s) ** 2)
    assert normalize_importance(s, mask_lowest=0.5).tolist() == [[0, 1, 0, 1]]
    assert normalize_importance(s, mask_lowest=0).tolist() == [[1, 1, 1, 1]]
    np.testing.assert_allclose(normalize_importance(s, bins=2, r_min=0.1).numpy(), [[0.1, 1, 0.1, 1]])
    np.testing.assert_allclose(normalize_importance(s, bins=4, r_min=0.1).numpy(), [[0.4, 0.7, 0.1, 1]])
    # of equal scores the earlier one is the more important
    assert normalize_importance(torch.tensor([[1.0, 1, 1, 0]]), mask_lowest=0.5).tolist() == [[1, 1, 0, 0]]


def test_position_counts_only_tokens() -> None:
    valid = torch.tensor([[True, True, True, False, False]])
    weights = normalize_importance(torch.tensor([[3.0, 2.0, 1.0, 9.0, 9.0]]), valid=valid, position_norm="linear")
    assert weights.tolist() == [[1, 1, 1, 0, 0]]


def test_quantiles_clamp_what_lies_beyond() -> None:
    s = torch.arange(101.0)[None]
    weights = normalize_importance(s, r_min=0, quantile=0.9)[0].numpy()
    np.testing.assert_allclose(weights, np.clip((np.arange(101) - 10) / 80, 0, 1), atol=1e-12)
    mostly_equal = torch.cat([torch.zeros(99), torch.ones(1)])[None]
    assert normalize_importance(mostly_equal, r_min=0.5, quantile=0.9)[0].tolist() == [0.5] * 99 + [1]


@pytest.mark.parametrize(
    "options",
    [
        {"r_min": -0.1}, {"r_min": 1.0}, {"r_min": 0.5, "r_max": 0.5}, {"r_max": float("inf")}, {"quantile": 0.5}, {"quantile": 1.1},
        {"bins": 1}, {"mask_lowest": 1.0}, {"mask_lowest": -0.1}, {"bins": 2, "mask_lowest": 0.1}, {"power": 0}, {"r_min": float("nan")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        normalize_importance(torch.tensor([[1.0, 2.0]]), **options)  # type: ignore[arg-type]


def test_bad_scores_are_refused() -> None:
    for scale in ("square", "sqrt"):
        with pytest.raises(InputError, match="negative"):
            normalize_importance(torch.tensor([[-1.0, 2.0]]), scale=scale)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="sequence 1"):
        normalize_importance(torch.tensor([[1.0, 2.0], [1.0, torch.nan]]))
    with pytest.raises(InputError, match="all padding"):
        normalize_importance(torch.ones(1, 2), valid=torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="sequence 1 are all zero"):
        mean_one(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(InputError, match="negative"):
        mean_one(torch.tensor([[1.0, -2.0]]))


def test_weights_of_mean_one_keep_their_proportions() -> None:
    weights = torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 0.0]])
    assert mean_one(weights).tolist() == [[0.5, 1.0, 1.5], [3.0, 0.0, 0.0]]
