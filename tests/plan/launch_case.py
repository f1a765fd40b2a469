"""Compiles a step of a config for devices that are not here; prints its memory.

python launch_case.py CONFIG TARGET ATTENTION LAYERS (0: all)
"""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def main(name, target, attention, layers):
    sys.path += [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
    from compile_train_step import compile_config, devices_of

    config = runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]()
    model = config.model
    model = dataclasses.replace(
        model,
        num_layers=int(layers) or model.num_layers,
        dtype="bfloat16",
        attention=attention,
    )
    config = dataclasses.replace(config, model=model)
    print(json.dumps(compile_config(config, devices_of(target))))


if __name__ == "__main__":
    main(*sys.argv[1:])
