"""Writes goldens.npz and files.json: the results and the saved files of transformers.

For every case of `parity_case`: logits and hidden states, the config.json, and the
SHA-256 of the model.safetensors that `save_pretrained` writes.

Run it in the repository root, in an environment with torch, transformers and jaxlm:

    PYTHONPATH=.:tests/parity python tests/parity/make_goldens.py

The stored files were made with transformers 5.23.0 and torch 2.13.0 (CPU).
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from hf_case import build, run
from parity_case import CASES, FILES, GOLDENS, HIDDEN_ROWS, LOGIT_ROWS


def main():
    values, files = {}, {}
    for name, config in CASES.items():
        model = build(name, config)
        logits, hidden = run(model, config)
        print(f"{name:18} std {logits.std():.2f}  hidden std {hidden.std():.2f}")
        values[f"{name}/logits"] = logits[LOGIT_ROWS]
        values[f"{name}/hidden"] = hidden[:, HIDDEN_ROWS]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights = (Path(folder) / "model.safetensors").read_bytes()
            saved = json.loads((Path(folder) / "config.json").read_text())
        files[name] = {"sha256": hashlib.sha256(weights).hexdigest(), "config": saved}
    np.savez_compressed(GOLDENS, **values)
    FILES.write_text(json.dumps(files, indent=1) + "\n")
    print(f"{GOLDENS.name}: {GOLDENS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
