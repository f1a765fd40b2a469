"""Compiles a step of a config for devices that are not here; prints its figures.

python launch_case.py CONFIG TARGET ATTENTION LAYERS (0: all) [CHANGES ...]

More chips than the config has take as many rows each. Each of CHANGES is JSON of fields,
such as {"optimizer.name": "muon"}, and compiles once more.
"""

import json
import math
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def main(name, target, attention, layers, *changes):
    sys.path += [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
    from compile_train_step import compile_config, devices_of
    from step_traffic import replaced, run_of

    config = run_of(name)
    devices = devices_of(target)
    # How many times as many chips.
    times = len(devices) // math.prod(vars(config.mesh).values())
    fixed = {
        "model.num_layers": int(layers) or config.model.num_layers,
        "model.dtype": "bfloat16",
        "model.attention": attention,
        "mesh.fsdp": config.mesh.fsdp * times,
        "train.batch_size": config.train.batch_size * times,
    }
    for change in changes or ("{}",):
        changed = replaced(config, fixed | json.loads(change))
        print(json.dumps(compile_config(changed, devices)))


if __name__ == "__main__":
    main(*sys.argv[1:])
