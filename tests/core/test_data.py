"""Cutting text into windows: the laws of packing and judging windows, every source, every bad input."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from whatmatters.core import data
from whatmatters.core.data import Calibration, calibration, call_model, check_fits, documents, logits, windows
from whatmatters.core.errors import DataError, FileError, InputTypeError, ModelError

STEP = 10_000  # token ids of numbered documents: STEP * document + position


class Letters:
    """A tokenizer with one token a character."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __init__(self):
        self.characters = 0

    def __call__(self, texts, **settings):
        self.characters += sum(map(len, texts))
        return {"input_ids": [[ord(c) + 2 for c in text] for text in texts]}


class Unbegun(Letters):
    bos_token_id = None


class Bare(Unbegun):
    eos_token_id = None


def numbered(sizes):
    """Documents of ids from which document and position of every token can be read."""
    return [STEP * index + torch.arange(size) for index, size in enumerate(sizes)]


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


sizes_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=8)


# ---------------------------------------------------------------- packing


@given(sizes=sizes_of_documents, length=st.integers(2, 9), samples=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_packed_windows_are_slices_of_whole_documents_in_a_row(sizes, length, samples, seed):
    texts = numbered(sizes)
    if sum(sizes) // length < samples:
        with pytest.raises(DataError, match="give more text"):
            calibration(None, texts, samples=samples, length=length, seed=seed)
        return
    made = calibration(None, texts, samples=samples, length=length, seed=seed)
    assert made.inputs.shape == (samples, length)
    assert made.valid is None
    assert made.start is None
    assert len(set(made.inputs.flatten().tolist())) == samples * length  # no token twice
    followers = {}  # which document follows which must be the same everywhere: there is one stream
    for row, owner in zip(made.inputs.tolist(), made.document.tolist(), strict=True):
        assert row[0] // STEP == owner
        for before, after in itertools.pairwise(row):
            if before // STEP == after // STEP:
                assert after == before + 1
            else:
                assert before % STEP == sizes[before // STEP] - 1  # the whole rest of the document came first
                assert after % STEP == 0
                assert followers.setdefault(before // STEP, after // STEP) == after // STEP


def test_every_token_is_equally_likely():
    sizes, draws = (30, 10, 24), 3000  # 64 tokens: 8 windows of 8, of which 2 are drawn
    counts = Counter()
    for seed in range(draws):
        counts.update(calibration(None, numbered(sizes), samples=2, length=8, seed=seed).inputs.flatten().tolist())
    expected, deviation = draws / 4, (draws * 0.25 * 0.75) ** 0.5
    assert len(counts) == 64
    assert max(abs(count - expected) for count in counts.values()) < 4.5 * deviation


def test_the_remainder_of_the_stream_is_reached_at_both_ends():
    seen = [set(calibration(None, torch.arange(14), samples=3, length=4, seed=seed).inputs.flatten().tolist()) for seed in range(40)]
    assert {min(tokens) for tokens in seen} == {0, 1, 2}
    assert {max(tokens) for tokens in seen} == {11, 12, 13}


def test_where_few_documents_are_enough_any_may_be_taken(monkeypatch):
    monkeypatch.setattr(data, "PIECE", 50)
    taken = Counter()
    for seed in range(500):  # 8 x 10 tokens are two documents of 50
        taken.update(calibration(None, numbered([50] * 40), samples=1, length=10, seed=seed).document.tolist())
    assert len(taken) == 40
    assert scipy.stats.chisquare(list(taken.values())).pvalue > 1e-4


def test_seed_and_source_decide_everything():
    texts = [chr(97 + i) * (20 + 7 * i) for i in range(12)]
    one = calibration(Letters(), texts, samples=6, length=16, seed=3)
    same = calibration(Letters(), texts, samples=6, length=16, seed=3)
    generated = calibration(Letters(), texts, samples=6, length=16, seed=torch.Generator().manual_seed(3))
    assert torch.equal(one.inputs, same.inputs)
    assert one.digest == same.digest == generated.digest
    assert calibration(Letters(), texts, samples=6, length=16, seed=4).digest != one.digest


def test_the_global_generator_is_not_used():
    state = torch.get_rng_state()
    calibration(None, torch.arange(100), samples=2, length=8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("tokenizer", "separator"), [(Letters(), [0]), (Unbegun(), [1]), (Bare(), [])])
def test_documents_begin_with_the_beginning_or_end_token(tokenizer, separator):
    made = windows(tokenizer, ["ab", "c" * 4], length=5)
    first = made.inputs[0][made.valid[0]] if made.valid is not None else made.inputs[0]
    assert first.tolist() == [*separator, ord("a") + 2, ord("b") + 2]


def test_only_as_much_is_tokenized_as_windows_are_drawn_from(monkeypatch):
    monkeypatch.setattr(data, "PIECE", 100)
    tokenizer = Letters()
    made = calibration(tokenizer, ["x" * 50] * 1000, samples=2, length=20)
    assert len(made) == 2
    assert 8 * 40 <= tokenizer.characters <= 8 * 40 + 300  # of 50,000


def test_a_huge_document_is_taken_in_pieces(monkeypatch):
    monkeypatch.setattr(data, "PIECE", 64)
    text = "".join(chr(200 + i) for i in range(4000))
    tokenizer = Letters()
    made = calibration(tokenizer, [text], samples=3, length=16, seed=1)
    assert tokenizer.characters < 1000
    for row in made.inputs.tolist():
        breaks = sum(after != before + 1 for before, after in itertools.pairwise(row))
        assert breaks <= 2  # a window of 16 crosses at most one border of pieces of 64, and perhaps the document's beginning
    assert made.document.tolist() == [0, 0, 0]


def test_a_source_without_end_is_read_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(data, "READ_LIMIT", 500)
    made = calibration(Letters(), ["a" * 100] * 5 + ["b" * 100] * 50, samples=10, length=16)
    assert ord("b") + 2 not in made.inputs


# ---------------------------------------------------------------- judging windows


@given(sizes=sizes_of_documents, length=st.integers(2, 9), per_document=st.none() | st.integers(1, 3), limit=st.none() | st.integers(1, 9))
@settings(deadline=None)
def test_judging_windows_hold_their_document_from_its_beginning(sizes, length, per_document, limit):
    texts = numbered(sizes)
    if max(sizes) < 2:
        with pytest.raises(DataError, match="nothing to predict"):
            windows(None, texts, length=length)
        return
    made = windows(None, texts, length=length, per_document=per_document, limit=limit)
    valid = torch.ones_like(made.inputs, dtype=torch.bool) if made.valid is None else made.valid
    assert made.valid is None or not bool(made.valid.all())
    found = []
    for row, mask, owner, start in zip(made.inputs, valid, made.document.tolist(), made.start.tolist(), strict=True):
        size = int(mask.sum())
        assert bool(mask[:size].all())  # padding is on the right
        assert row[:size].tolist() == [STEP * owner + start + i for i in range(size)]
        assert size == min(length, sizes[owner] - start)
        found.append((owner, start))
    expected = []
    for owner, size in enumerate(sizes):
        starts = [start for start in range(0, size, length) if size - start >= 2]
        expected += [(owner, start) for start in starts[:per_document]]
    assert found == expected[:limit]


@given(sizes=sizes_of_documents, length=st.integers(2, 9), stride=st.integers(1, 9))
@settings(deadline=None)
def test_strided_windows_overlap_and_end_with_their_document(sizes, length, stride):
    stride = min(stride, length)
    if max(sizes) < 2:
        return
    plain = windows(None, numbered(sizes), length=length)
    made = plain.strided(stride)
    kept = {}  # a tail of one token is dropped by the plain windows
    for owner, start, row in zip(plain.document.tolist(), plain.start.tolist(), range(len(plain)), strict=True):
        kept[owner] = start + (length if plain.valid is None else int(plain.valid[row].sum()))
    expected = []
    for owner, size in kept.items():
        for start in range(0, size, stride):
            if size - start >= 2:
                expected.append((owner, start, min(length, size - start)))
            if start + length >= size:
                break
    sizes_made = [length] * len(made) if made.valid is None else made.valid.sum(dim=1).tolist()
    assert list(zip(made.document.tolist(), made.start.tolist(), sizes_made, strict=True)) == expected
    for row, (owner, start, size) in zip(made.inputs, expected, strict=True):
        assert row[:size].tolist() == [STEP * owner + start + i for i in range(size)]


def test_stride_needs_consecutive_windows():
    with pytest.raises(DataError, match=r"data\.windows"):
        calibration(None, torch.arange(100), samples=2, length=8).strided(4)
    made = windows(None, numbered([30]), length=8)
    for stride in (0, 9):
        with pytest.raises(DataError, match="expected 1 to 8"):
            made.strided(stride)
    gap = Calibration(made.inputs[::2], None if made.valid is None else made.valid[::2], made.document[::2], 8, "", made.start[::2])
    with pytest.raises(DataError, match="do not follow each other"):
        gap.strided(4)


# ---------------------------------------------------------------- sources

texts_strategy = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), min_size=1, max_size=6)


@given(texts=texts_strategy)
@settings(deadline=None)
def test_the_same_texts_from_every_source(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    expected = [text for text in texts if text.strip() != ""]
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    (folder / "b.jsonl").write_text("\n\n".join(json.dumps(text, ensure_ascii=False) for text in texts), encoding="utf-8")
    write_parquet(folder / "c.parquet", body=[*texts, None], other=[1] * (len(texts) + 1))
    sources = [texts, folder / "a.jsonl", str(folder / "b.jsonl"), folder / "c.parquet"]
    for source in sources:
        if expected:
            assert documents(source, field="body") == expected
        else:
            with pytest.raises(DataError, match="no text"):
                documents(source, field="body")


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\n\r\nTwo é\n".encode())
    assert documents(tmp_path / "a.txt") == ["One\n\nTwo é\n"]


def test_parquet_kinds_of_strings(tmp_path):
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        write_parquet(tmp_path / "a.parquet", text=pyarrow.array(["x", "y", "x"]).cast(kind))
        assert documents(tmp_path / "a.parquet") == ["x", "y", "x"]


def test_ids_from_tensors():
    rows = torch.arange(12, dtype=torch.int32).view(2, 6)
    assert windows(None, rows, length=6).inputs.tolist() == rows.tolist()
    assert windows(None, rows, length=6).inputs.dtype == torch.int64
    assert windows(None, rows.flatten(), length=6).document.tolist() == [0, 0]
    assert windows(None, list(rows), length=6).document.tolist() == [0, 1]


def bad_files():
    yield "missing.txt", None, FileError, "no such file"
    yield "folder.txt/", None, FileError, "is a folder"
    yield "a.csv", b"x", DataError, "read from .txt, .jsonl or .parquet"
    yield "noend", b"x", DataError, "no suffix"
    yield "empty.txt", b"", DataError, "no text"
    yield "blank.txt", b" \n\t\n", DataError, "no text"
    yield "binary.txt", bytes(range(256)), DataError, "UTF-8"
    yield "zero.txt", b"ab\0cd", DataError, "zero byte at character 2"
    yield "latin.txt", "caf\u00e9".encode("latin-1"), DataError, "byte 3"
    yield "empty.jsonl", b"", DataError, "no text"
    yield "broken.jsonl", b'{"text": "a"}\n{"text": \n', DataError, "line 2: not valid JSON"
    yield "field.jsonl", b'{"text": "a"}\n{"txt": "b", "id": 1}\n', DataError, "line 2: no field 'text'; it has 'txt', 'id'"
    yield "number.jsonl", b'{"text": 3}\n', DataError, "line 1: the text is int"
    yield "list.jsonl", b"[1]\n", DataError, "line 1: the text is list"
    yield "deep.jsonl", b"[" * 100_000, DataError, "line 1: not valid JSON"
    yield "digits.jsonl", b"1" * 10_000, DataError, "line 1"
    yield "surrogate.jsonl", b'{"text": "a\\ud800"}', DataError, "line 1: a lone surrogate at character 1"
    yield "pickle.jsonl", b"\x80\x04cos\nsystem\n", DataError, "line 1 is not UTF-8"
    yield "short.parquet", b"PAR1", DataError, "not a readable parquet"
    yield "text.parquet", b"hello" * 100, DataError, "not a readable parquet"


@pytest.mark.parametrize(("name", "content", "error", "message"), list(bad_files()), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_files(tmp_path, name, content, error, message):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    for read in (documents, lambda p: calibration(Letters(), p), lambda p: windows(Letters(), p)):
        with pytest.raises(error, match=message):
            read(path)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_parquet_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=["x"], number=[1])
    with pytest.raises(DataError, match="no column 'text'; it has 'body', 'number'"):
        documents(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'number' is int64; expected strings"):
        documents(tmp_path / "a.parquet", field="number")


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    if os.access(tmp_path / "a.txt", os.R_OK):
        # root reads everything: a file that is a device in disguise fails in the same place
        (tmp_path / "a.txt").unlink()
        (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    with pytest.raises(FileError, match="cannot read"):
        documents(tmp_path / "a.txt")


@given(content=st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_give_text_or_our_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for name in ("fuzz.txt", "fuzz.jsonl", "fuzz.parquet"):
        (folder / name).write_bytes(content)
        try:
            found = documents(folder / name)
        except DataError:
            continue
        assert found
        assert all(isinstance(text, str) and text.strip() for text in found)


@given(data_=st.data())
@settings(max_examples=500, deadline=None)
def test_a_damaged_parquet_file_gives_text_or_our_error(tmp_path_factory, data_):
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    write_parquet(path, text=["one", "two", "three"])
    content = bytearray(path.read_bytes())
    if data_.draw(st.booleans()):
        content = content[: data_.draw(st.integers(0, len(content)))]
    else:
        for _ in range(data_.draw(st.integers(1, 4))):
            content[data_.draw(st.integers(0, len(content) - 1))] ^= 1 << data_.draw(st.integers(0, 7))
    path.write_bytes(content)
    with contextlib.suppress(DataError, FileError):
        documents(path)


def test_bad_lists_and_tensors():
    for source in ([], [" "]):
        with pytest.raises(DataError, match="no text"):
            documents(source)
    with pytest.raises(DataError, match="document 1 of the list: a lone surrogate"):
        documents(["a", "\ud800"])
    with pytest.raises(TypeError):
        documents(["a", 3])
    with pytest.raises(TypeError):
        documents(3)
    with pytest.raises(InputTypeError, match="tokenizer is None"):
        calibration(None, ["text"])
    with pytest.raises(DataError, match="1-D tensor of integer"):
        windows(None, torch.rand(10))
    with pytest.raises(DataError, match=r"expected \(length,\) or"):
        windows(None, torch.zeros(2, 2, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="negative"):
        windows(None, torch.tensor([1, -100, 2]))


@pytest.mark.parametrize("setting", [{"samples": 0}, {"samples": -1}, {"length": 1}, {"batch": 0}])
def test_counts_out_of_range(setting):
    with pytest.raises(DataError, match="expected at least"):
        calibration(Letters(), ["text"], **setting)


@pytest.mark.parametrize("setting", [{"limit": 0}, {"per_document": 0}, {"length": 1}, {"batch": 0}])
def test_window_counts_out_of_range(setting):
    with pytest.raises(DataError, match="expected at least"):
        windows(Letters(), ["text"], **setting)


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(DataError, match="11 tokens, less than one window of 512"):
        calibration(Letters(), ["0123456789"])
    with pytest.raises(DataError, match="at most 2 samples"):
        calibration(Letters(), ["0123456789"], samples=3, length=4)


# ---------------------------------------------------------------- the record


def test_micro_batches_cover_the_samples_in_order():
    made = Calibration.from_tensors(torch.arange(35).view(7, 5), torch.arange(35).view(7, 5) < 33, batch=3)
    parts = list(made.batches())
    assert [len(inputs) for inputs, _ in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), made.inputs)
    assert torch.equal(torch.cat([valid for _, valid in parts]), made.valid)
    assert len(made) == 7
    assert made.tokens == 33


def test_narrow_ids_are_widened():
    assert Calibration.from_tensors(torch.ones(2, 3, dtype=torch.int32)).inputs.dtype == torch.int64


def test_features_for_plain_models():
    made = Calibration.from_tensors(torch.rand(4, 3, 2))
    assert made.tokens == 12
    assert next(made.batches())[1] is None
    assert Calibration.from_tensors(torch.rand(4, 3)).digest != Calibration.from_tensors(torch.rand(4, 3)).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.zeros(0, 4)}, "at least one sample"),
        ({"inputs": torch.tensor(3)}, "at least one sample"),
        ({"inputs": torch.zeros(2, 0)}, "at least one sample"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.bool)}, "expected int64"),
        ({"inputs": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"\(samples, length\)"),
        ({"inputs": torch.zeros(2, dtype=torch.int64)}, r"\(samples, length\)"),
        ({"inputs": torch.full((2, 3), -1)}, "negative"),
        ({"inputs": torch.zeros(2, 3), "batch": 0}, "batch is 0"),
        ({"inputs": torch.zeros(2, 3), "valid": torch.ones(2, 4, dtype=torch.bool)}, r"expected bool of shape \(2, 3\)"),
        ({"inputs": torch.zeros(2, 3), "valid": torch.ones(2, 3)}, "expected bool"),
        ({"inputs": torch.zeros(2, 3), "valid": torch.tensor([[True] * 3, [False] * 3])}, "without any valid token"),
        ({"inputs": torch.zeros(2, 3), "document": torch.zeros(3, dtype=torch.int64)}, r"of shape \(2,\)"),
    ],
)
def test_tensors_that_do_not_fit(arguments, message):
    with pytest.raises(DataError, match=message):
        Calibration.from_tensors(**arguments)


def test_the_digest_is_of_inputs_and_padding_and_the_same_in_every_process():
    inputs = torch.arange(6).view(2, 3)
    digest = Calibration.from_tensors(inputs).digest
    assert Calibration.from_tensors(inputs, batch=2, source="elsewhere").digest == digest
    assert Calibration.from_tensors(inputs.T.contiguous().T).digest == digest  # other strides in memory
    assert Calibration.from_tensors(inputs.view(3, 2)).digest != digest
    assert Calibration.from_tensors(inputs + 1).digest != digest
    assert Calibration.from_tensors(inputs, inputs < 5).digest != digest
    code = "import torch; from whatmatters.core.data import Calibration as C; print(C.from_tensors(torch.arange(6).view(2, 3)).digest)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == digest


def test_calibration_is_frozen():
    made = Calibration.from_tensors(torch.zeros(1, 2))
    with pytest.raises(AttributeError):
        made.batch = 3


# ---------------------------------------------------------------- calling models


class Recorder(nn.Module):
    """Takes what a Hugging Face model takes and remembers it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        self.got = (attention_mask, use_cache)
        return type("Output", (), {"logits": self.embedding(input_ids)})()


def test_models_are_called_as_they_are_made():
    ids, model = torch.tensor([[1, 2, 3], [4, 5, 0]]), Recorder()
    call_model(model, ids)
    assert model.got == (None, False)
    call_model(model, ids, torch.ones(2, 3, dtype=torch.bool))
    assert model.got == (None, False)  # no mask where nothing is padding: masks slow attention down
    valid = torch.tensor([[True] * 3, [True, True, False]])
    call_model(model, ids, valid)
    assert model.got[0].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert torch.equal(logits(model, ids), model.embedding(ids))
    plain = nn.Sequential(nn.Linear(3, 2))
    features = torch.rand(5, 3)
    assert torch.equal(call_model(plain, features), plain(features))
    assert torch.equal(logits(nn.Sequential(model.embedding), ids), model.embedding(ids))


def test_models_that_know_no_cache_are_not_told_of_it():
    class Bare(nn.Module):
        def forward(self, input_ids):
            return input_ids + 1

    assert call_model(Bare(), torch.ones(1, 2, dtype=torch.int64)).tolist() == [[2, 2]]


def test_models_without_logits_are_refused():
    with pytest.raises(ModelError, match=r"Flatten gives a tensor of shape \(2, 3\)"):
        logits(nn.Flatten(), torch.zeros(2, 3, dtype=torch.int64))


def test_windows_of_another_model_are_refused():
    check_fits(Recorder(), Calibration.from_tensors(torch.tensor([[9, 9]])))
    check_fits(Recorder(), Calibration.from_tensors(torch.rand(1, 2)))
    with pytest.raises(DataError, match="token id 10, the model knows 10"):
        check_fits(Recorder(), Calibration.from_tensors(torch.tensor([[9, 10]])))
    model = Recorder()
    model.config = type("Config", (), {"max_position_embeddings": 4})()
    check_fits(model, Calibration.from_tensors(torch.ones(1, 4, dtype=torch.int64)))
    with pytest.raises(DataError, match="use length=4"):
        check_fits(model, Calibration.from_tensors(torch.ones(1, 5, dtype=torch.int64)))
