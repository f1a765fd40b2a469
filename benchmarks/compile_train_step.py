"""Compiles a training step for devices that are not present.

python benchmarks/compile_train_step.py v5e:16x16 [--attention pallas_tpu splash xla]
python benchmarks/compile_train_step.py h100:8 --attention pallas_gpu cudnn

Compiles one step of a model of 1B parameters (llama3.2-1b) ahead of time, once for each
implementation of attention, and prints seconds, memory per device, and the compiler's
counts. Nothing runs: the figures show that the program compiles and fits, not that it
is right or fast. Needs libtpu (`pip install 'jax[tpu]'`) for TPU topologies, and the
cuda13 plugin for h100. Results go to benchmarks/results/compile_train_step.json.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Two processes may compile at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import argparse
import dataclasses
import json
import re
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxlm.config import Config, DataConfig, MeshConfig, TrainConfig
from jaxlm.model.presets import preset
from jaxlm.plan.traffic import by_part, rows, traffic
from jaxlm.sharding import rules
from jaxlm.sharding.mesh import make_mesh
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.state import abstract_state
from jaxlm.train.step import make_train_step
from jaxlm.types import Batch

RESULTS = Path(__file__).parent / "results" / "compile_train_step.json"
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce-scatter", "all-reduce")
KERNEL = r'custom_call_target="(tpu_custom_call|mosaic_gpu[^"]*|__cudnn\$fmha[^"]*)"'

# An H100 SXM, from the public figures in openxla's gpu_specs.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices_of(target: str) -> list[jax.Device]:
    """Describes devices: a TPU topology such as `v5e:16x16`, or cards as `h100:8`."""
    kind, _, size = target.partition(":")
    if kind == "h100":
        described = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{size}", target_config=H100
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return list(described.devices)


def compile_step(
    devices: list[jax.Device],
    attention: str,
    *,
    layers: int,
    rows: int,
    length: int,
    remat: str = "full",
) -> dict:
    """Compiles a step of llama3.2-1b, cut over all devices by fsdp."""
    model = dataclasses.replace(
        preset("llama3.2-1b"),
        num_layers=layers,
        context_length=length,
        dtype="bfloat16",
        remat=remat,
        attention=attention,
    )
    config = Config(
        model=model,
        data=DataConfig(sequence_length=length),
        mesh=MeshConfig(data=1, fsdp=len(devices)),
        train=TrainConfig(batch_size=rows * len(devices), loss_chunk=4096),
    )
    return compile_config(config, devices)


def compile_config(config: Config, devices: list[jax.Device]) -> dict:
    """Compiles a step of a run, on its mesh."""
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = abstract_state(config.model, optimizer, mesh)
        shape_of = partial(
            jax.ShapeDtypeStruct,
            (config.train.batch_size, config.data.sequence_length),
            sharding=rules.batch_sharding(mesh),
        )
        batch = Batch(*[shape_of(jnp.int32)] * 4, shape_of(jnp.float32))
        started = time.monotonic()
        lowered = make_train_step(config, optimizer).lower(state, batch)
        traced = time.monotonic()
        compiled = lowered.compile()
    sent = traffic(compiled.as_text(), mesh.shape)
    return figures(compiled) | {
        "gib_sent": {str(part): round(g, 4) for part, g in by_part(sent).items()},
        "gib_waited_for": {
            str(part): round(g, 4)
            for part, g in by_part(t for t in sent if not t.overlapped).items()
        },
        "gib_reduced": round(
            sum(t.bytes for t in sent if t.kind == "all-reduce") / 2**30, 4
        ),
        "table": rows(sent),
        "trace_s": round(traced - started, 1),
        "compile_s": round(time.monotonic() - traced, 1),
    }


def figures(compiled) -> dict:
    """Reads the figures of a compiled program, per device."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost = compiled.cost_analysis() or {}
    return {
        "arguments_mib": round(memory.argument_size_in_bytes / 2**20, 1),
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "kernels": len(re.findall(KERNEL, text)),
        "collectives": {
            name: len(re.findall(rf"\b{name}(?:-start)?[.\d]*\(|calls=%{name}\b", text))
            for name in COLLECTIVES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", help="v5e:16x16, v5p:4x4x4, v6e:16x16, h100:8 ...")
    parser.add_argument("--attention", nargs="+", default=["pallas_tpu", "splash"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2, help="batch rows per device")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    devices = devices_of(options.target)
    sizes = {"layers": options.layers, "rows": options.rows, "length": options.length}
    sizes["remat"] = options.remat
    found = {}
    for attention in options.attention:
        print(f"{options.target}: compiling with {attention} ...", flush=True)
        try:
            found[attention] = compile_step(devices, attention, **sizes)
        except ValueError as refusal:
            found[attention] = {"declined": str(refusal).partition(";")[0]}
        print(json.dumps(found[attention]), flush=True)
    if options.no_record:
        return
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    entry = {"device": devices[0].device_kind, "jax": jax.__version__, **sizes}
    old[options.target] = entry | {"attention": found}
    RESULTS.write_text(json.dumps(old, indent=1) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
