"""jaxlm: train, sample and look inside decoder-only language models.

The names below are the public ones; everything else is reached by its module.
"""

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
