"""Hold a conversation with a model that was trained to chat.

Importing this file imports no JAX, so a wrong flag is reported at once.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxlm.commands.process import log_paused, use_compile_cache
from jaxlm.config import MeshConfig, ModelConfig, SampleConfig
from jaxlm.flags import Flat, Positional, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Hold a conversation with a model that was trained to chat."""

    run: Positional[Path | None] = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or hf:owner/name;
    None takes the newest run below runs/."""
    system: str | None = None
    """Content of the system message; None sends none."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Compute dtype; None keeps the run's."""
    sample: Flat[SampleConfig] = field(
        default_factory=lambda: SampleConfig(temperature=0.8)
    )
    """How tokens are sampled."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices to use."""


def main(arguments: Sequence[str], prog: str) -> int:
    """`[CHECKPOINT] [--system TEXT] ...`; returns the exit code."""
    chosen = parse(Arguments, arguments, prog=prog)
    chat(chosen)
    return 0


def chat(chosen: Arguments) -> None:
    """Loads the model onto the devices requested and holds the conversation."""
    import jax

    from jaxlm.checkpoint.load import load_onto_mesh, open_checkpoint
    from jaxlm.checkpoint.native.run_folder import newest_run
    from jaxlm.infer.conversation import converse
    from jaxlm.sharding.mesh import make_mesh_of_size

    use_compile_cache()
    checkpoint = open_checkpoint(chosen.run or newest_run())
    model, tokenizer = checkpoint.config, checkpoint.tokenizer()
    if chosen.dtype is not None:
        model = dataclasses.replace(model, dtype=chosen.dtype)
    sample_config = chosen.sample
    if not sample_config.stop_ids:
        sample_config = dataclasses.replace(sample_config, stop_ids=tokenizer.stop_ids)
    with jax.set_mesh(make_mesh_of_size(chosen.mesh)):
        params = load_onto_mesh(checkpoint)
        log_attention(model)
        with log_paused():
            converse(
                model,
                params,
                tokenizer,
                sample_config,
                jax.random.key(chosen.seed),
                system=chosen.system,
            )


def log_attention(model: ModelConfig) -> None:
    """Logs the attention choice before the chat starts, so it doesn't interrupt it."""
    from jaxlm.model.attention_choice import attention_choices

    context = model.context_length
    for name, num_queries in (("prefill", context), ("decode", 1)):
        for kind, choice in attention_choices(model, 1, num_queries, context).items():
            logger.info("attention of %s layers, %s: %s", kind, name, choice)
            if choice.warning is not None:
                logger.warning("attention, %s: %s", name, choice.warning)
