"""Prints the number of parameters of each preset in transformers, without weights.

PYTHONPATH=.:tests/parity python tests/parity/make_counts.py
"""

import torch
import transformers as hf
from hf_case import model_config

from jaxlm.model.presets import PRESETS


def main():
    for name, config in PRESETS.items():
        if name.startswith("transformer"):
            continue
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(model_config(name, config))
        model.tie_weights()
        print(f'    "{name}": {sum(p.numel() for p in model.parameters()):_},')


if __name__ == "__main__":
    main()
