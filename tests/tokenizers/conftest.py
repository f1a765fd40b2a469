import pytest
from hugging_face_case import GOLDENS, golden_tokenizer


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory):
    return {n: golden_tokenizer(n, tmp_path_factory.mktemp(n)) for n in GOLDENS}
