"""Writes sae_lens_goldens.json: small autoencoders as sae_lens 6.54 writes and runs them.

    python tests/interp/directions/make_sae_lens_goldens.py

Runs in a Python with sae-lens. Weights are random. Of each there are the two files of its
folder (`cfg.json`, and `sae_weights.safetensors` in base64), an input, and the features
and the output that sae_lens computes from it. `old` is a folder of before sae_lens 6: its
config has other names, and its weights a factor that is 1. `gemma_scope` is a params.npz,
read by sae_lens's loader of such files.
"""

import base64
import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import sae_lens
import torch
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file, save_file

D, M, OUT, K = 6, 10, 5, 3
SIZES = {"d_in": D, "d_sae": M}
KINDS = {
    "standard": ("standard", {"apply_b_dec_to_input": True}),
    "topk": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "gated": ("gated", {"apply_b_dec_to_input": False}),
    "jumprelu": ("jumprelu", {"apply_b_dec_to_input": False}),
    "transcoder": ("transcoder", {"d_out": OUT, "apply_b_dec_to_input": False}),
    "jumprelu_transcoder": (
        "jumprelu_transcoder",
        {"d_out": OUT, "apply_b_dec_to_input": False},
    ),
}
OLD = {
    "hook_point": "blocks.1.hook_resid_pre",
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": K},
    "normalize_activations": False,
    "dtype": "float32",
    **SIZES,
}
X = torch.randn(4, D, generator=torch.Generator().manual_seed(0)) * 2


def loud(sae, seed):
    """Draws weights anew: sae_lens begins with biases of 0 and a tied encoder."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in sae.named_parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * 0.7)
            if name == "threshold":
                x.abs_()
    return sae


def golden(sae, **files):
    with torch.no_grad():
        features = sae.encode(X)
        return {
            **files,
            "x": X.tolist(),
            "features": features.tolist(),
            "output": sae.decode(features).tolist(),
        }


def in_base64(path):
    return base64.b64encode(path.read_bytes()).decode()


def folder_files(folder):
    return {
        "cfg": json.loads((folder / "cfg.json").read_text()),
        "weights": in_base64(folder / "sae_weights.safetensors"),
    }


def main():
    goldens = {"sae_lens": sae_lens.__version__}
    with tempfile.TemporaryDirectory() as root:
        for seed, (name, (kind, more)) in enumerate(KINDS.items()):
            sae_class, config_class = sae_lens.registry.SAE_CLASS_REGISTRY[kind]
            sae = loud(sae_class(config_class(**SIZES, **more)), seed)
            folder = Path(root) / name
            sae.save_model(folder)
            goldens[name] = golden(sae, **folder_files(folder))

        # Without rescaling, as an old file is.
        config = loaders.handle_pre_6_0_config(OLD)
        sae = loud(sae_lens.TopKSAE.from_dict(config), 20)
        folder = Path(root) / "old"
        sae.save_model(folder)
        path = folder / "sae_weights.safetensors"
        save_file({**load_file(path), "scaling_factor": torch.ones(M)}, path)
        (folder / "cfg.json").write_text(json.dumps(OLD))
        sae = sae_lens.SAE.load_from_disk(folder)
        goldens["old"] = golden(sae, **folder_files(folder))

        sae = loud(sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**SIZES)), 21)
        path = Path(root) / "params.npz"
        np.savez(
            path, **{name: x.detach().numpy() for name, x in sae.named_parameters()}
        )
        config = {
            "architecture": "jumprelu",
            "apply_b_dec_to_input": False,
            "finetuning_scaling_factor": False,
            **SIZES,
        }
        with (
            mock.patch.object(loaders, "hf_hub_download", return_value=str(path)),
            mock.patch.object(
                loaders, "get_gemma_2_config_from_hf", return_value=config
            ),
        ):
            config, weights, _ = loaders.gemma_2_sae_huggingface_loader("a/b", "c")
        sae = sae_lens.SAE.from_dict(config)
        sae.load_state_dict(weights)
        goldens["gemma_scope"] = golden(sae, weights=in_base64(path))
    path = Path(__file__).with_name("sae_lens_goldens.json")
    path.write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
