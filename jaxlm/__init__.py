"""jaxlm: train, sample and look inside decoder-only language models.

The names below are the public ones; everything else is reached by its module. Each is
imported when it is first used, so that `jaxlm --help` need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.checkpoint.load import load, load_tokenizer
    from jaxlm.config import Config, ModelConfig, SampleConfig
    from jaxlm.infer.generate import Generation, generate
    from jaxlm.model.kv_cache import init_cache
    from jaxlm.model.params import init
    from jaxlm.model.transformer import Output, forward
    from jaxlm.ops.probe import Tap

__all__ = [
    "Config",
    "Generation",
    "ModelConfig",
    "Output",
    "SampleConfig",
    "Tap",
    "forward",
    "generate",
    "init",
    "init_cache",
    "load",
    "load_tokenizer",
]

_MODULES = {
    "checkpoint.load": ("load", "load_tokenizer"),
    "config": ("Config", "ModelConfig", "SampleConfig"),
    "infer.generate": ("Generation", "generate"),
    "model.kv_cache": ("init_cache",),
    "model.params": ("init",),
    "model.transformer": ("Output", "forward"),
    "ops.probe": ("Tap",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # Imported here because it takes a while.
        value = importlib.import_module("importlib.metadata").version("jaxlm")
    elif name not in _MODULE_OF:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    else:
        value = getattr(importlib.import_module(f"jaxlm.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
