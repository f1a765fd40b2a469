"""Writes goldens.npz: what transformers computes for every case of `parity_case`.

Run in the repository root, in an environment with torch, transformers and jaxlm:

    PYTHONPATH=.:tests/parity python tests/parity/make_goldens.py

The stored file was made with transformers 5.23.0 and torch 2.13.0 (CPU).
"""

import numpy as np
from hf_case import run
from parity_case import CASES, GOLDENS, HIDDEN_ROWS, LOGIT_ROWS


def main():
    values = {}
    for name, config in CASES.items():
        logits, hidden = run(name, config)
        print(f"{name:18} std {logits.std():.2f}  hidden std {hidden.std():.2f}")
        values[f"{name}/logits"] = logits[LOGIT_ROWS]
        values[f"{name}/hidden"] = hidden[:, HIDDEN_ROWS]
    np.savez_compressed(GOLDENS, **values)
    print(f"{GOLDENS.name}: {GOLDENS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
