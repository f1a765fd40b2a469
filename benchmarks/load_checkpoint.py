"""Compares loading a checkpoint with reading its file and copying it to the device.

python benchmarks/load_checkpoint.py FOLDER [--rounds 5]
python benchmarks/load_checkpoint.py FOLDER --make-sparse llama3.1-8b

The baseline reads model.safetensors into memory and copies it to the device, which any
loader must do. Both alternate in separate processes, with the file in the page cache.
Prints medians, the ratio of CPU seconds (beside other work, only they count), and
the peak memory of a process beyond the parameters, and writes them to
benchmarks/results/load_checkpoint.json. With --make-sparse it first creates FOLDER: a
bfloat16 checkpoint of that preset whose weights are a hole in the file.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from train_step import child, machine

# The baseline reads in parts, so that it does not hold the model twice.
PART = 1 << 28
RESULTS = Path(__file__).parent / "results" / "load_checkpoint.json"


def memory_mb() -> int:
    """This process's anonymous memory (RssAnon) in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) // 1024


def worker(kind: str, folder: Path) -> dict[str, float]:
    """Times one way of loading the checkpoint onto the device."""
    import threading

    import jax
    import numpy as np

    from jaxlm.checkpoint.load import load

    jax.devices()
    before, peak, running = memory_mb(), 0, True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, memory_mb())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, start_cpu = time.perf_counter(), time.process_time()
    if kind == "baseline":
        result = []
        with (folder / "model.safetensors").open("rb") as file:
            while len(raw := np.fromfile(file, np.uint8, PART)):
                result.append(jax.numpy.array(raw))
    else:
        _, result = load(folder)
    jax.block_until_ready(result)
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - start_cpu
    running = False
    watcher.join()
    held = sum(x.nbytes for x in jax.tree.leaves(result)) // 2**20
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "beyond_parameters_mb": peak - before - held,
    }


def make_sparse(folder: Path, name: str) -> None:
    """Writes a checkpoint with the real header of a preset, and a hole for weights."""
    import ml_dtypes
    import numpy as np

    from jaxlm.checkpoint.hf import hf_config_writing, hf_names
    from jaxlm.checkpoint.hf.safetensors_file import make_header
    from jaxlm.checkpoint.tensor_mapping import TensorMapping
    from jaxlm.model.presets import preset

    config = preset(name)
    values, _ = hf_config_writing.write(config)
    mapping = TensorMapping(config, hf_names.RULES[values["model_type"]])
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = {
        tensor: (mapping.their_shape(rule), dtype)
        for rule in mapping.rules
        for tensor, _ in mapping.names(rule)
    }
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    _, header = make_header(path, specs, None)
    size = sum(int(np.prod(shape)) * 2 for shape, _ in specs.values())
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (folder / "config.json").write_text(json.dumps(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--make-sparse", metavar="PRESET")
    parser.add_argument("--worker", choices=["baseline", "jaxlm"])
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, arguments.folder)))
        return
    if arguments.make_sparse:
        make_sparse(arguments.folder, arguments.make_sparse)
    runs: dict[str, list[dict]] = {"baseline": [], "jaxlm": []}
    for number in range(arguments.rounds + 1):
        for kind, found in runs.items():
            command = [sys.executable, __file__, str(arguments.folder)]
            result = child([*command, "--worker", kind], JAX_PLATFORMS="cpu")
            if number:  # the first round fills the page cache
                found.append(result)
                cpu = found[-1]["cpu_seconds"]
                print(
                    f"{kind:9} {found[-1]['seconds']:.3f} s, CPU {cpu:.3f} s",
                    flush=True,
                )

    def medians(name: str) -> dict[str, float]:
        return {k: statistics.median(r[name] for r in v) for k, v in runs.items()}

    cpu_seconds = medians("cpu_seconds")
    name = arguments.make_sparse or arguments.folder.name
    size = (arguments.folder / "model.safetensors").stat().st_size
    result = {
        "bytes": size,
        "seconds": {k: [r["seconds"] for r in v] for k, v in runs.items()},
        "median_seconds": medians("seconds"),
        "median_cpu_seconds": cpu_seconds,
        "cpu_ratio": cpu_seconds["jaxlm"] / cpu_seconds["baseline"],
        "beyond_parameters_mb": {
            k: max(r["beyond_parameters_mb"] for r in v) for k, v in runs.items()
        },
        "machine": machine(),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=2))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, name: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
