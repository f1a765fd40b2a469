"""FLOPs per token, and the peak FLOP/s of devices.

Their quotient is the model FLOPs utilization (MFU; Chowdhery et al. 2022, appendix B):
the FLOPs that the model needs, divided by those that the devices could do at peak in
the same time. Recomputation does not count, nor do scores that a causal mask hides.
"""

import itertools
from collections.abc import Sequence

import jax

from jaxlm.config import ModelConfig
from jaxlm.model.params import count_matmul_params

# Peak bf16 FLOP/s without sparsity of one JAX device, by `device_kind`.
# TPU: cloud.google.com/tpu/docs (system architecture), per chip. On v2, v3 and 7x each
# of a chip's two cores is a device, so their entries are half of the chip's figure.
_TPU_PEAKS = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v4 lite": 137e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7": 2307e12 / 2,
    "TPU7x": 2307e12 / 2,
}

# GPU: the vendors' data sheets (NVIDIA's figures with sparsity are halved here). The
# first name that occurs in `device_kind` is taken, so longer names come first:
# "NVIDIA H100 PCIe" is slower than the H100 on the SXM board.
_GPU_PEAKS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 383e12 / 2,  # each of its two dies is a device
}


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Counts the FLOPs per token of a training step, forward and backward.

    `6 * count_matmul_params + sum over layers of 12 * N * H * span`, where the span is
    the mean number of keys that a token may see: (T + 1) / 2 for T tokens in a row, or
    less in local layers. 6 = 2 for multiply and add, times 1 forward and 2 backward;
    12 = 6 for each of the two einsums, with keys and with values. PaLM (appendix B)
    takes T for the span, also what a causal mask hides: its MFU is higher. That tokens
    do not see other documents of their row is not subtracted.

    Raises:
      ValueError: if model.vocab_size is 0.
    """
    T = sequence_length
    window = min(T, config.window or T)
    # Only local layers have a window.
    spans = {"global": (T + 1) / 2}
    spans["local"] = (window * (window + 1) / 2 + (T - window) * window) / T
    kinds = itertools.islice(itertools.cycle(config.layer_pattern), config.num_layers)
    span = sum(spans[kind] for kind in kinds)
    attention = 12 * config.num_heads * config.head_dim * span
    return 6 * count_matmul_params(config) + attention


def published_peak_flops(device_kind: str) -> float | None:
    """Returns the peak bf16 FLOP/s (dense) of one device, or None if unknown."""
    if device_kind in _TPU_PEAKS:
        return _TPU_PEAKS[device_kind]
    words = device_kind.replace("-", " ").replace("_", " ")
    for name, peak in _GPU_PEAKS.items():
        if f" {name} " in f" {words} ":
            return peak
    return None


def peak_flops(
    # Type checkers take the alias jax.Device for a variable.
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
) -> float | None:
    """Returns the peak bf16 FLOP/s of all `devices` together; None if one is unknown.

    It is the published figure, whatever the dtype of a run is, so that runs can be
    compared. For CPUs none is published.
    """
    peaks = [published_peak_flops(device.device_kind) for device in devices]
    return None if None in peaks else float(sum(p for p in peaks if p is not None))
