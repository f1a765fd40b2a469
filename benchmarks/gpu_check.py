"""Tests and times attention on this machine's accelerator.

python benchmarks/gpu_check.py [--quick] [--out FOLDER]

Runs tests/ops/attention/test_attention.py with compiled kernels on the device, then
benchmarks/attention.py at 1k to 16k tokens, head_dim 64 and 128. Writes
attention_DEVICE.json (timings) and check_DEVICE.json, the record that `PROVEN` in
jaxlm/ops/attention/dispatch.py and `PROVEN_SPECIALIZED` in its gpu/pallas_gpu.py ask
for. Needs `pip install '.[test]'`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS = "tests/ops/attention/test_attention.py"


def run_tests(platform: str) -> dict:
    """Runs the tests on the device; returns the result and pytest's summary."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rf", TESTS]
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env={**os.environ, "JAXLM_TEST_PLATFORM": platform},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
    failed = [x for x in done.stdout.splitlines() if x.startswith("FAILED")]
    return {
        "tests_passed": done.returncode == 0,
        "summary": done.stdout.splitlines()[-1] if done.stdout else "",
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two lengths, one width")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    # In a separate process: this one must not occupy the device.
    program = (
        "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    platform, device = done.stdout.splitlines()[-2:]
    if platform == "cpu":
        raise SystemExit(
            "error: no accelerator found; on a CPU the tests run in the interpreter"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    name = device.replace(" ", "_")
    record = {"device": device, **run_tests("cuda" if platform == "gpu" else platform)}
    check = options.out / f"check_{name}.json"
    check.write_text(json.dumps(record, indent=1) + "\n")
    lengths = ["1024", "4096"] if options.quick else ["1024", "2048", "4096", "16384"]
    timings = options.out / f"attention_{name}.json"
    subprocess.run(
        [
            *(sys.executable, HERE / "attention.py", "--out", timings),
            *("--lengths", *lengths),
            *("--head-dims", *(["64"] if options.quick else ["64", "128"])),
        ],
        check=True,
    )
    record["timings"] = timings.name
    check.write_text(json.dumps(record, indent=1) + "\n")
    print(check)


if __name__ == "__main__":
    main()
