"""Changes of the code do not change the bytes of exported files."""

import json

import pytest
from exported_case import EXPORTED, MODELS, exported_hashes

RECORDED = json.loads(EXPORTED.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_exported_files_are_the_recorded_ones(tmp_path, name):
    assert exported_hashes(name, tmp_path) == RECORDED[name]
