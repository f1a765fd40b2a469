import pytest

from jaxlm.data.sources import BUNDLED_FOLDER


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    """Every test has a token cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def shakespeare():
    return (BUNDLED_FOLDER / "shakespeare.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def models(shakespeare):
    """A SentencePiece tokenizer of each algorithm, trained on a part of the text."""
    from jaxlm.data.tokenizer import train_sentencepiece

    text = shakespeare[:100_000]
    return {a: train_sentencepiece([text], 500, a) for a in ("bpe", "unigram")}
