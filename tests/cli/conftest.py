"""What the command-line tests share: tiny models in folders with a tokenizer, a text, and a way to run a command."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from whatmatters.cli.main import app
from whatmatters.testing.families import VOCABULARY, build


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w1, w2, ... are the tokens 1, 2, ..."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<unk>")


def save_tiny(folder: Path, family: str = "llama", **settings: int | bool) -> Path:
    """A tiny model of a family and its tokenizer in a folder."""
    build(family, **settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, words: int = 6000, seed: int = 0) -> Path:
    """Words in a random order with some structure, in lines."""
    draw = random.Random(seed)
    tokens = [f"w{draw.randrange(1, VOCABULARY)}" for _ in range(words)]
    path.write_text("\n".join(" ".join(tokens[i : i + 12]) for i in range(0, words, 12)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks."""
    return save_tiny(tmp_path_factory.mktemp("models") / "three", layers=3)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6,000 tokens."""
    return write_text(tmp_path_factory.mktemp("texts") / "words.txt")


@pytest.fixture
def saved() -> Callable[..., Path]:
    """`save_tiny`, for models of a test's own."""
    return save_tiny


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run a command in this process: its exit code must be as told, and nothing that looks like a traceback may be printed."""

    def invoke(*arguments: object, code: int = 0) -> Result:
        before = torch.get_rng_state()
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        assert torch.equal(before, torch.get_rng_state())
        return result

    return invoke


SMALL = ("--samples", "6", "--length", "16")
"""Few and short windows."""


@pytest.fixture
def small() -> tuple[str, ...]:
    """Options for few and short windows."""
    return SMALL


@pytest.fixture
def listing() -> Callable[[Path], dict[str, bytes | None]]:
    """Every path below a folder, and the bytes of every file."""

    def taken(folder: Path) -> dict[str, bytes | None]:
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}

    return taken
