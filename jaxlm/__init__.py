"""jaxlm: train, sample and look inside decoder-only language models.

The names below are the public ones; everything else is reached by its module. Each is
imported when it is first used, so that `jaxlm --help` need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.checkpoint.load import load, load_tokenizer
    from jaxlm.checkpoint.save import save
    from jaxlm.config import Config, ModelConfig, SampleConfig
    from jaxlm.infer.conversation.chat_ids import chat_ids
    from jaxlm.infer.generate import Generation, generate
    from jaxlm.infer.scoring import score
    from jaxlm.infer.speculative.proposals import DraftModel, PromptLookup
    from jaxlm.model.block import Block
    from jaxlm.model.initialization import init, init_cache
    from jaxlm.model.params import quantize_matrices
    from jaxlm.model.presets import preset
    from jaxlm.model.transformer import Output, forward, unembed
    from jaxlm.ops.attention.dispatch import attention
    from jaxlm.ops.attention.spec import AttentionSpec, Mask
    from jaxlm.ops.loss import cross_entropy
    from jaxlm.ops.probing.edit import Edit, check_hits
    from jaxlm.ops.probing.sites import SITES
    from jaxlm.ops.probing.tap import Tap

__all__ = [
    "SITES",
    "AttentionSpec",
    "Block",
    "Config",
    "DraftModel",
    "Edit",
    "Generation",
    "Mask",
    "ModelConfig",
    "Output",
    "PromptLookup",
    "SampleConfig",
    "Tap",
    "attention",
    "chat_ids",
    "check_hits",
    "cross_entropy",
    "forward",
    "generate",
    "init",
    "init_cache",
    "load",
    "load_tokenizer",
    "preset",
    "quantize_matrices",
    "save",
    "score",
    "unembed",
]

_MODULES = {
    "checkpoint.load": ("load", "load_tokenizer"),
    "checkpoint.save": ("save",),
    "config": ("Config", "ModelConfig", "SampleConfig"),
    "infer.conversation.chat_ids": ("chat_ids",),
    "infer.generate": ("Generation", "generate"),
    "infer.scoring": ("score",),
    "infer.speculative.proposals": ("DraftModel", "PromptLookup"),
    "model.block": ("Block",),
    "model.initialization": ("init", "init_cache"),
    "model.params": ("quantize_matrices",),
    "model.presets": ("preset",),
    "model.transformer": ("Output", "forward", "unembed"),
    "ops.attention.dispatch": ("attention",),
    "ops.attention.spec": ("AttentionSpec", "Mask"),
    "ops.loss": ("cross_entropy",),
    "ops.probing.edit": ("Edit", "check_hits"),
    "ops.probing.sites": ("SITES",),
    "ops.probing.tap": ("Tap",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"jaxlm.{_MODULE_OF[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("jaxlm")
    else:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
