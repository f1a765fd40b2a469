"""Our files equal those of transformers byte for byte; runs without transformers.

files.json has the config.json of every tiny model and the hash of its weights as
`save_pretrained` wrote them (`make_goldens.py`).
"""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_case import CASES, FILES, nested, weights

from jaxlm import tree
from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.checkpoint.load import load
from jaxlm.fields import diff

SAVED = json.loads(FILES.read_text())


@pytest.mark.parametrize("name", CASES)
def test_weights_are_written_and_read_as_transformers_does(tmp_path, name):
    case, flat = CASES[name], weights(CASES[name])
    write_hf(tmp_path / "m", case, jax.tree.map(jnp.asarray, nested(flat)), None)
    written = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert hashlib.sha256(written).hexdigest() == SAVED[name]["sha256"]
    # From here on, the folder is as transformers wrote it.
    (tmp_path / "m" / "config.json").write_text(json.dumps(SAVED[name]["config"]))
    lines = []
    config, params = load(tmp_path / "m", report=lines.append)
    assert not lines
    # Linear scaling has no original length.
    left = diff(case, config, ignore=NOT_KEPT)
    assert left in ([], ["rope_scaling.original_context_length: 48 -> 0"])
    for path, value in tree.flatten(params).items():
        assert np.array_equal(np.asarray(value), flat[path]), path
