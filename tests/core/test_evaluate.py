"""Measuring: perplexity and KL against naive float64 loops, the bootstrap against scipy and closed forms, memory, speed, state."""

import copy
import math
import threading
import weakref

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from whatmatters.core import evaluate as module
from whatmatters.core.data import Calibration, calibration, windows
from whatmatters.core.errors import DataError, FileError, InputError, ModelError, NonFiniteError
from whatmatters.core.evaluate import (
    Difference,
    Measurement,
    PeakMemory,
    compare,
    evaluate,
    generate,
    judging,
    latency,
    paired_bootstrap,
    size_on_disk,
)

VOCABULARY = 32
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0),
    "mixture": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


def tiny(family="llama", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family])
        for parameter in model.parameters():  # larger than at initialisation, so that predictions differ much
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def texts(*sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (size,), generator=draw) for size in sizes]


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module")
def llama64():
    return copy.deepcopy(tiny()).double()


def next_log_probabilities(model64, context):
    """Log-probabilities of the token after `context`, from one call for this token alone, normalised by scipy."""
    with torch.no_grad():
        return scipy.special.log_softmax(model64(input_ids=context[None]).logits[0, -1].numpy())


def first_window_of(position, length, stride):
    return 0 if position < length else stride * math.ceil((position - length + 1) / stride)


def naive(model64, documents, length, stride=None):
    """Nats and counts per document, one token at a time: each from the first window that holds it."""
    stride = length if stride is None else stride
    nats, counts = [], []
    for document in documents:
        total, count = 0.0, 0
        for position in range(1, len(document)):
            start = first_window_of(position, length, stride)
            if start < position:
                total -= next_log_probabilities(model64, document[start:position])[document[position]]
                count += 1
        if count:
            nats.append(total)
            counts.append(count)
    return np.array(nats), np.array(counts)


# ---------------------------------------------------------------- perplexity


def test_losses_are_those_of_a_naive_loop(llama, llama64):
    documents = texts(9, 1, 16, 2, 21)
    measured = evaluate(llama, windows(None, documents, length=8, batch=3))
    nats, counts = naive(llama64, documents, 8)
    np.testing.assert_allclose(measured.nats, nats, rtol=1e-5)
    np.testing.assert_array_equal(measured.counts, counts)
    np.testing.assert_array_equal(measured.document, [0, 2, 3, 4])
    assert measured.unit == "document"
    assert measured.loss == pytest.approx(nats.sum() / counts.sum(), rel=1e-5)
    assert measured.perplexity == pytest.approx(np.exp(nats.sum() / counts.sum()), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(2, 22), min_size=2, max_size=3), length=st.integers(2, 9), stride=st.integers(1, 9))
def test_stride_judges_each_token_once_with_its_context(llama, llama64, sizes, length, stride):
    stride = min(stride, length)
    # a tail of one token is not in the plain windows, so there is nothing to overlap for it
    documents = [document if len(document) % length != 1 else document[:-1] for document in texts(*sizes)]
    documents = [document for document in documents if len(document) >= 2]
    if len(documents) < 2:
        return
    measured = evaluate(llama, windows(None, documents, length=length, batch=4), stride=stride)
    nats, counts = naive(llama64, documents, length, stride)
    np.testing.assert_array_equal(measured.counts, counts)
    np.testing.assert_allclose(measured.nats, nats, rtol=2e-5)
    if stride < length:
        assert counts.tolist() == [len(document) - 1 for document in documents]


def test_a_stride_of_the_length_changes_nothing(llama):
    text = windows(None, texts(20, 13, 9), length=8)
    np.testing.assert_array_equal(evaluate(llama, text).nats, evaluate(llama, text, stride=8).nats)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_changes_nothing(family):
    model = tiny(family)
    documents = texts(3, 12, 7)
    together = evaluate(model, windows(None, documents, length=16))
    for index, document in enumerate(documents):
        alone = evaluate(model, Calibration.from_tensors(document[None]))
        assert together.nats[index] == pytest.approx(alone.nats[0], rel=1e-5)
        assert together.counts[index] == alone.counts[0]


def test_micro_batches_and_chunks_do_not_matter(llama, monkeypatch):
    text = windows(None, texts(20, 13, 9, 30), length=8)
    whole = evaluate(llama, text, against=tiny(seed=1), batch=100)
    sizes = []
    original = module._per_token
    monkeypatch.setattr(module, "CHUNK", 3 * VOCABULARY)
    monkeypatch.setattr(module, "_per_token", lambda scores, targets: sizes.append(scores[0].shape) or original(scores, targets))
    pieces = evaluate(llama, text, against=tiny(seed=1), batch=2)
    assert max(size[0] for size in sizes) == 3  # never more than CHUNK logits in float32
    for name in ("nats", "divergence", "hits", "agreements", "counts"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-5)


class Watched(nn.Module):
    """Remembers every logits tensor it gave, weakly."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, VOCABULARY)
        self.given, self.alive, self.rows = [], [], []

    def forward(self, ids):
        self.alive.append(sum(reference() is not None for reference in self.given))
        self.rows.append(len(ids))
        output = self.embedding(ids).clone()
        self.given.append(weakref.ref(output))
        return output


def test_logits_of_one_micro_batch_are_held():
    model = Watched()
    evaluate(model, windows(None, texts(50, 40), length=8, batch=2))
    assert max(model.rows) == 2
    assert len(model.alive) > 4
    assert max(model.alive) <= 1  # the one before may live until it is replaced


def test_columns_of_padding_are_not_computed():
    shapes = []
    model = nn.Embedding(VOCABULARY, VOCABULARY)
    model.register_forward_hook(lambda _, arguments, output: shapes.append(tuple(output.shape[:2])))
    evaluate(model, windows(None, texts(5, 3), length=64))
    assert shapes == [(2, 5)]


def test_half_precision_models_are_judged_in_float32():
    model = nn.Embedding(VOCABULARY, VOCABULARY).to(torch.bfloat16)
    ids = texts(20)[0][None]
    measured = evaluate(model, Calibration.from_tensors(ids))
    scores = scipy.special.log_softmax(model.weight.detach().double().numpy(), axis=1)
    expected = -scores[ids[0, :-1], ids[0, 1:]].sum()
    assert measured.nats.sum() == pytest.approx(expected, rel=1e-6)


def test_one_document_is_measured_by_window(llama):
    measured = evaluate(llama, windows(None, texts(20), length=8))
    assert measured.unit == "window"
    assert measured.counts.tolist() == [7, 7, 3]
    assert evaluate(llama, calibration(None, texts(30, 30), samples=4, length=8)).tokens == 28


# ---------------------------------------------------------------- against the original


def test_kl_and_agreement_are_those_of_scipy(llama, llama64):
    documents, other = texts(9, 14), tiny(seed=1)
    measured = evaluate(other, windows(None, documents, length=8), against=llama)
    other64 = copy.deepcopy(other).double()
    for index, document in enumerate(documents):
        kl, agreed, hit = 0.0, 0, 0
        for position in range(1, len(document)):
            start = position // 8 * 8
            if start < position:
                original = next_log_probabilities(llama64, document[start:position])
                changed = next_log_probabilities(other64, document[start:position])
                kl += scipy.special.rel_entr(np.exp(original), np.exp(changed)).sum()
                agreed += original.argmax() == changed.argmax()
                hit += changed.argmax() == int(document[position])
        assert measured.divergence[index] == pytest.approx(kl, rel=1e-5)
        assert measured.agreements[index] == agreed
        assert measured.hits[index] == hit
    assert measured.kl == pytest.approx(measured.divergence.sum() / measured.tokens)
    assert measured.agreement == measured.agreements.sum() / measured.tokens
    assert measured.accuracy == measured.hits.sum() / measured.tokens


def test_a_model_against_itself(llama):
    measured = evaluate(llama, windows(None, texts(9, 14), length=8), against=llama)
    assert measured.kl == 0
    assert measured.agreement == 1
    assert evaluate(llama, windows(None, texts(9, 14), length=8)).kl is None


def test_tokens_that_both_rule_out_add_nothing():
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = -math.inf
    one, other = nn.Embedding(4, 4), nn.Embedding(4, 4)
    one.weight.data, other.weight.data = weight, weight + torch.tensor([0.5, 0.0, -0.5, 0.0])
    measured = evaluate(one, Calibration.from_tensors(torch.tensor([[0, 1, 2], [2, 1, 0]])), against=other)
    p, q = scipy.special.softmax(other.weight.detach().numpy(), 1)[:, :3], scipy.special.softmax(weight.numpy(), 1)[:, :3]
    expected = scipy.special.rel_entr(p, q).sum(axis=1)[[0, 1, 2, 1]].sum() / 4
    assert measured.kl == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- bad inputs and state


def test_what_cannot_be_judged(llama):
    text = windows(None, texts(9, 14), length=8)
    with pytest.raises(DataError, match="int64 token ids"):
        evaluate(llama, Calibration.from_tensors(torch.rand(2, 3)))
    with pytest.raises(DataError, match="nothing to judge"):
        evaluate(llama, Calibration.from_tensors(torch.tensor([[1], [2]])))
    with pytest.raises(DataError, match="batch is 0"):
        evaluate(llama, text, batch=0)
    with pytest.raises(DataError, match="stride is 9"):
        evaluate(llama, text, stride=9)
    with pytest.raises(DataError, match="token id 40"):
        evaluate(llama, Calibration.from_tensors(torch.tensor([[1, 40]])))
    with pytest.raises(DataError, match="context of 64"):
        evaluate(llama, windows(None, texts(100), length=65))
    with pytest.raises(ModelError, match="expected logits"):
        evaluate(nn.Flatten(), text)
    with pytest.raises(ModelError, match="one vocabulary"):
        evaluate(llama, text, against=nn.Embedding(VOCABULARY, VOCABULARY + 1))


def test_nan_and_zero_probability_are_refused():
    text = Calibration.from_tensors(torch.tensor([[0, 1, 2], [2, 3, 0], [0, 0, 1]]), batch=2)
    model = nn.Embedding(4, 4)
    model.weight.data[3] = math.nan
    with pytest.raises(NonFiniteError, match="position 2 of window 1"):
        evaluate(model, text)
    model = nn.Embedding(4, 4)
    model.weight.data[0, 0] = -math.inf
    with pytest.raises(NonFiniteError, match="position 1 of window 2"):
        evaluate(model, text)


class Raising(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY), nn.Dropout(0.5))
        self.calls = calls

    def forward(self, ids):
        torch.rand(3)  # a model that draws
        self.calls -= 1
        if self.calls == 0:
            raise RuntimeError("stop")
        return self.body(ids)


@pytest.mark.parametrize("calls", [100, 2])
def test_the_model_and_the_generator_are_left_as_found(calls):
    model = Raising(calls).train()
    model.body[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    text = windows(None, texts(40, 9), length=8, batch=2)
    if calls == 2:
        with pytest.raises(RuntimeError, match="stop"):
            evaluate(model, text)
    else:
        assert evaluate(model, text).nats.tolist() == evaluate(model, text).nats.tolist()  # dropout is off
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_judging_turns_gradients_and_training_off(llama):
    llama.train()
    with judging(llama):
        assert not torch.is_grad_enabled()
        assert not any(m.training for m in llama.modules())
    assert all(m.training for m in llama.modules())
    llama.eval()


def test_progress_is_told(llama):
    told = []
    evaluate(llama, windows(None, texts(40), length=8, batch=2), progress=lambda *seen: told.append(seen))
    assert told == [("evaluate", 0, 3), ("evaluate", 1, 3), ("evaluate", 2, 3), ("evaluate", 3, 3)]


# ---------------------------------------------------------------- comparison


def measurement(nats, counts, text="t"):
    counts = np.array(counts, dtype=np.int64)
    return Measurement(np.array(nats, dtype=float), counts, counts * 0, None, None, np.arange(len(counts)), "document", text)


def test_the_bootstrap_is_that_of_scipy():
    draw = np.random.default_rng(0)
    weights = draw.integers(50, 500, 40).astype(float)
    values = weights * draw.normal(0.02, 0.05, 40)
    estimate, low, high = paired_bootstrap(values, weights, resamples=20_000, confidence=0.9)
    theirs = scipy.stats.bootstrap(
        (values, weights), lambda v, w, axis: v.sum(axis) / w.sum(axis), paired=True, vectorized=True, n_resamples=20_000,
        confidence_level=0.9, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert estimate == pytest.approx(values.sum() / weights.sum())
    assert low == pytest.approx(theirs.low, abs=0.02 * (high - low))
    assert high == pytest.approx(theirs.high, abs=0.02 * (high - low))


def test_the_bootstrap_is_exact_where_it_can_be_enumerated():
    # Two units: the resampled ratio is one of three values with probabilities 1/4, 1/2, 1/4.
    values, weights = np.array([1.0, 9.0]), np.array([1.0, 3.0])
    assert paired_bootstrap(values, weights, confidence=0.9) == (10 / 4, 1.0, 3.0)
    assert paired_bootstrap(values, weights, confidence=0.3) == (10 / 4, 2.5, 2.5)


def test_intervals_cover_as_often_as_they_say():
    draw, covered, trials = np.random.default_rng(0), 0, 400
    for trial in range(trials):
        weights = draw.integers(50, 150, 60).astype(float)
        _, low, high = paired_bootstrap(weights * draw.normal(0.1, 0.3, 60), weights, seed=trial, resamples=400)
        covered += low <= 0.1 <= high
    assert 0.91 <= covered / trials <= 0.98  # 95 % promised, a little less for 60 units; 3 standard errors are 3.3 %


def test_the_bootstrap_does_not_depend_on_how_it_is_cut(monkeypatch):
    values, weights = np.linspace(-1, 2, 30), np.linspace(1, 5, 30)
    whole = paired_bootstrap(values, weights, resamples=500)
    monkeypatch.setattr(module, "RESAMPLED", 100)
    assert paired_bootstrap(values, weights, resamples=500) == whole


def test_comparison_of_two_models(llama):
    text = windows(None, texts(*range(20, 60)), length=16)
    original, damaged = evaluate(llama, text), evaluate(tiny(seed=1), text)
    difference = compare(original, damaged)
    assert difference.log_ratio == pytest.approx(math.log(damaged.perplexity / original.perplexity))
    assert difference.perplexity_change == pytest.approx(100 * (damaged.perplexity / original.perplexity - 1))
    low, high = difference.interval
    assert low < difference.log_ratio < high
    assert difference.perplexity_interval == pytest.approx((100 * (math.exp(low) - 1), 100 * (math.exp(high) - 1)))
    assert difference.units == 40
    assert compare(original, damaged) == difference
    assert compare(original, damaged, seed=torch.Generator().manual_seed(0)) == difference
    assert compare(original, damaged, seed=1).interval != difference.interval
    back = compare(damaged, original)
    assert back.log_ratio == pytest.approx(-difference.log_ratio)
    assert back.interval == pytest.approx((-high, -low))


def test_pairing_sees_what_independent_intervals_would_not():
    draw = np.random.default_rng(0)
    counts = np.full(50, 100)
    nats = counts * draw.uniform(1, 5, 50)  # documents differ far more than models
    difference = compare(measurement(nats, counts), measurement(nats + counts * draw.normal(0.02, 0.01, 50), counts))
    assert difference.significant
    assert difference.interval[1] - difference.interval[0] < 0.01
    same = compare(measurement(nats, counts), measurement(nats + counts * draw.normal(0, 0.01, 50), counts), confidence=0.999)
    assert not same.significant


def test_significance_is_on_either_side_of_zero():
    assert Difference(0.1, (0.05, 0.2), 0.95, 9, "document", 100).significant
    assert Difference(-0.1, (-0.2, -0.05), 0.95, 9, "document", 100).significant
    assert not Difference(0.1, (-0.05, 0.2), 0.95, 9, "document", 100).significant


def test_one_unit_tells_nothing_about_others():
    difference = compare(measurement([5.0], [3]), measurement([9.0], [3]))
    assert difference.interval == (-math.inf, math.inf)
    assert difference.perplexity_interval == (-100.0, math.inf)
    assert not difference.significant


def test_a_perplexity_beyond_floats_is_infinite():
    assert measurement([1e6], [1]).perplexity == math.inf
    assert compare(measurement([1.0, 1.0], [1, 1]), measurement([1e6, 1e6], [1, 1])).perplexity_change == math.inf


def test_comparisons_that_cannot_be_made(llama):
    one = evaluate(llama, windows(None, texts(9, 14), length=8))
    for other in (
        evaluate(llama, windows(None, texts(9, 14, seed=1), length=8)),
        evaluate(llama, windows(None, texts(9, 14), length=8), stride=4),
    ):
        with pytest.raises(InputError, match="different text"):
            compare(one, other)
    for setting, message in (({"resamples": 99}, "at least 100"), ({"confidence": 1.0}, "between 0 and 1"), ({"confidence": 0.0}, "0")):
        with pytest.raises(InputError, match=message):
            compare(one, one, **setting)
    with pytest.raises(InputError, match="as many of both"):
        paired_bootstrap(np.ones(2), np.ones(3))
    with pytest.raises(InputError, match="at least one"):
        paired_bootstrap(np.ones(0), np.ones(0))
    for values, weights in (([1.0, math.nan], [1.0, 1.0]), ([1.0, 1.0], [1.0, 0.0]), ([1.0, 1.0], [1.0, math.inf])):
        with pytest.raises(InputError, match="finite"):
            paired_bootstrap(np.array(values), np.array(weights))


def test_summary_is_json_able(llama):
    import json

    text = windows(None, texts(9, 14), length=8)
    summary = json.loads(json.dumps(evaluate(llama, text, against=llama).summary()))
    assert summary["documents"] == 2
    assert summary["tokens"] == 19
    assert summary["agreement"] == 1.0


# ---------------------------------------------------------------- size, memory, speed, text


def test_size_on_disk(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b").write_bytes(b"x" * 23)
    (tmp_path / "below" / "link").symlink_to(tmp_path / "a")
    assert size_on_disk(tmp_path) == 123
    assert size_on_disk(str(tmp_path / "below")) == 123  # a hub cache is a folder of links
    assert size_on_disk(tmp_path / "a") == 100
    with pytest.raises(FileError, match="no such path"):
        size_on_disk(tmp_path / "c")


def test_peak_memory_of_a_block_that_is_gone_again():
    threads = threading.active_count()
    with PeakMemory() as memory:
        block = np.ones(150 * 2**17)  # 150 MiB
        during = memory._process.memory_info().rss
        del block
    assert memory.bytes >= min(140 * 2**20, during - memory.start)
    assert 100 * 2**20 < memory.bytes < 400 * 2**20
    assert threading.active_count() == threads
    with PeakMemory() as memory:
        pass
    assert memory.bytes < 50 * 2**20
    with pytest.raises(InputError, match=r"interval is 0\.0"):
        PeakMemory(interval=0.0)


def test_peak_memory_stops_after_a_raise():
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="stop"), PeakMemory():
        raise RuntimeError("stop")
    assert threading.active_count() == threads


@pytest.mark.parametrize("family", CONFIGS)
def test_latency_of_prefill_and_decoding(family):
    model = tiny(family).train()
    measured = latency(model, torch.ones(2, 64, dtype=torch.int64), repeats=2)  # as long as the context: decoding has no room to spare
    assert 0 < measured.decode < 10
    assert measured.prefill_per_token == measured.prefill / 128
    assert model.training


def test_latency_of_a_plain_model():
    assert latency(nn.Embedding(9, 9), torch.ones(1, 3, dtype=torch.int64), repeats=1).decode is None
    with pytest.raises(InputError, match="repeats is 0"):
        latency(nn.Embedding(9, 9), torch.ones(1, 3, dtype=torch.int64), repeats=0)


class Letters:
    bos_token_id, eos_token_id = 0, 1

    def __call__(self, text, **settings):
        return {"input_ids": [ord(c) - 95 for c in text]}

    def decode(self, ids, **settings):
        return "".join(chr(int(i) + 95) for i in ids)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_text_is_that_of_calling_the_model_again_and_again(family):
    model, tokenizer = tiny(family, seed=3), Letters()
    model.generation_config.repetition_penalty = 9.0  # recommendations of the checkpoint must not matter
    model.generation_config.do_sample = True
    ids = [0, *tokenizer("abc")["input_ids"]]
    with torch.no_grad():
        for _ in range(20):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == 1:
                break
            ids.append(token)
    assert generate(model, tokenizer, "abc", new_tokens=20) == tokenizer.decode(ids[4:])


def test_generation_of_a_plain_model_and_its_end():
    model, tokenizer = nn.Embedding(32, 32), Letters()
    model.weight.data = torch.eye(32).roll(1, dims=1)  # each token is followed by the next, 31 by 0
    assert generate(model, tokenizer, "c", new_tokens=3) == "def"
    assert generate(model, tokenizer, "|", new_tokens=30) == "}~_"  # 29, 30, 31, 0, then 1 ends it


def test_generation_that_cannot_be(llama):
    with pytest.raises(InputError, match="new_tokens is 0"):
        generate(llama, Letters(), "a", new_tokens=0)
    with pytest.raises(InputError, match="context of 64"):
        generate(llama, Letters(), "a" * 60, new_tokens=4)
    tokenizer = Letters()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    with pytest.raises(InputError, match="prompt is empty"):
        generate(llama, tokenizer, "")
