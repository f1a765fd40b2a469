"""Hold a conversation with a model that was trained to chat."""

import dataclasses
import logging

import jax

from jaxlm.checkpoint.load import load_onto_mesh, open_checkpoint
from jaxlm.checkpoint.native.run_folder import newest_run
from jaxlm.commands.arguments import ChatArguments
from jaxlm.commands.process import log_paused, use_compile_cache
from jaxlm.config import ModelConfig
from jaxlm.infer.conversation import converse
from jaxlm.model.attention_choice import attention_choices
from jaxlm.sharding.mesh import make_mesh_of_size

logger = logging.getLogger(__name__)


def main(chosen: ChatArguments) -> int:
    """Loads the model onto the devices requested and holds the conversation."""
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
    return 0


def log_attention(model: ModelConfig) -> None:
    """Logs the attention choice before the chat starts, so it doesn't interrupt it."""
    context = model.context_length
    for name, num_queries in (("prefill", context), ("decode", 1)):
        for kind, choice in attention_choices(model, 1, num_queries, context).items():
            logger.info("attention of %s layers, %s: %s", kind, name, choice)
            if choice.warning is not None:
                logger.warning("attention, %s: %s", name, choice.warning)
