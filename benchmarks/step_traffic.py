"""What a chip sends in a training step, for chips that are not here.

python benchmarks/step_traffic.py [CASE ...] [--whole] [--name after]

Compiles steps of the runs in `configs/` ahead of time, of two layers on the meshes of
`CASES`, or of the whole model on its own mesh, and reads GiB by part from the program.
Needs libtpu (`pip install 'jax[tpu]'`) for TPUs, and the cuda13 plugin for h100. Adds
to benchmarks/results/step_traffic.json, where `before` is a step of commit ad785ac: run
this script with that commit's package, and today's `plan/`, in PYTHONPATH.
"""

import argparse
import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any

from compile_train_step import compile_config, devices_of

from jaxlm.config import Config

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "step_traffic.json"
CONFIGS = {"llama3.2-1b": "llama_1b_v5e_16", "llama3-8b": "llama_8b_v5p_64"}
# Model, target, mesh: how many rows of 4,096 tokens each part of `fsdp` has.
CASES = {
    "llama3-8b, v6e:4x4, fsdp 16": 2,
    "llama3-8b, v5p:4x4x4, fsdp 64": 2,
    "llama3.2-1b, v6e:4x4, fsdp 16": 2,
    "llama3.2-1b, v6e:16x16, fsdp 256": 2,
    "llama3.2-1b, v5p:2x2x4, fsdp 16": 2,
    "llama3.2-1b, v5p:4x8x8, fsdp 256": 2,
    "llama3-8b, v5p:2x4x4, fsdp 2 x tensor 16": 8,
    "llama3-8b, v6e:4x8, fsdp 2 x tensor 16": 8,
}
WHOLE = {
    "configs/llama_1b_v5e_16.py, v5e:4x4": "splash",
    "configs/llama_8b_v5p_64.py, v5p:4x4x4": "splash",
    "configs/llama_8b_h100_8.py, h100:8": "pallas_gpu",
}
FIGURES = ("gib_sent", "gib_waited_for", "gib_reduced", "table")
FIGURES += ("arguments_mib", "temporaries_mib", "kernels", "compile_s")


def run_of(name: str) -> Config:
    """Returns the run of a file in `configs/`."""
    return runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]()


def replaced(config: Config, changes: dict[str, Any]) -> Config:
    """Returns the config with fields, by their dotted names, replaced."""
    sections = {}
    for part in {name.partition(".")[0] for name in changes}:
        start = f"{part}."
        fields = {
            name.removeprefix(start): value
            for name, value in changes.items()
            if name.startswith(start)
        }
        sections[part] = dataclasses.replace(getattr(config, part), **fields)
    return dataclasses.replace(config, **sections)


def compiled_case(name: str) -> tuple[Config, dict]:
    """Compiles two layers on the mesh of a case."""
    model, target, mesh = name.split(", ")
    sizes = {f"mesh.{axis}": int(n) for axis, n in re.findall(r"(\w+) (\d+)", mesh)}
    rows = CASES[name] * sizes["mesh.fsdp"]
    changes = {"data.sequence_length": 4096, "model.context_length": 4096}
    changes |= {"model.num_layers": 2, "model.attention": "pallas_tpu"}
    changes |= {"model.dtype": "bfloat16", "train.batch_size": rows}
    config = replaced(run_of(CONFIGS[model]), changes | sizes)
    return config, compile_config(config, devices_of(target))


def compiled_whole(name: str) -> tuple[Config, dict]:
    """Compiles a whole model on the mesh of its run."""
    path, target = name.split(", ")
    changes = {"model.attention": WHOLE[name], "model.dtype": "bfloat16"}
    config = replaced(run_of(Path(path).stem), changes)
    return config, compile_config(config, devices_of(target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="beginnings of names; none: all")
    parser.add_argument("--whole", action="store_true", help="whole models")
    parser.add_argument("--name", default="after", help="of the figures, in the file")
    arguments = parser.parse_args()
    names, compiled = CASES, compiled_case
    if arguments.whole:
        names, compiled = WHOLE, compiled_whole
    for name in names:
        if not name.startswith(tuple(arguments.cases or [""])):
            continue
        config, found = compiled(name)
        sizes = {
            "rows": config.train.batch_size,
            "length": config.data.sequence_length,
            "loss_chunk": config.train.loss_chunk,
        }
        figures = {"total_gib": round(sum(found["gib_sent"].values()), 3)}
        figures |= {key: found[key] for key in FIGURES}
        results = json.loads(RESULTS.read_text())
        part = results["whole models" if arguments.whole else "cases"]
        part[name] = sizes | part.get(name, {}) | {arguments.name: figures}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(figures, indent=1), flush=True)


if __name__ == "__main__":
    main()
