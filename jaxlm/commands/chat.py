"""Hold a conversation with a model that was trained to chat."""

import logging
import sys

import jax

from jaxlm import tree
from jaxlm.chat.dialogue import Dialogue, say
from jaxlm.chat.prompt import line_editor
from jaxlm.chat.unsaved import Unsaved, conversations_folder, not_ended
from jaxlm.checkpoint.load import load_onto_mesh
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.commands.generating.generation import open_model, with_stop_ids
from jaxlm.commands.process import log_paused, use_compile_cache
from jaxlm.config import ModelConfig
from jaxlm.flags.arguments import ChatArguments
from jaxlm.infer.conversation.chat_ids import turns_are_text
from jaxlm.infer.conversation.conversation import Conversation
from jaxlm.plan.attention_choice import attention_choices
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.terminal.progress import Waiting, format_count
from jaxlm.types import Params

logger = logging.getLogger(__name__)


def main(chosen: ChatArguments) -> int:
    """Loads the model onto the devices requested and holds the conversation."""
    use_compile_cache()
    at_keyboard = sys.stdin.isatty()  # perhaps with `| tee log`
    on_terminal = at_keyboard and sys.stdout.isatty()
    checkpoint, model = open_model(chosen)
    with jax.set_mesh(make_mesh_of_size(chosen.mesh)):
        with Waiting("loading the model"):
            conversation, params = begin(checkpoint, model, chosen)
        log_attention(model)
        folder = conversations_folder() if at_keyboard else None
        if on_terminal:
            print(describe(checkpoint, params))
            for left in not_ended(folder):
                say(
                    f"an earlier chat was cut off: /load {left} goes on with it, and "
                    "deleting the file forgets it"
                )
            print("/help lists commands and keys; /exit or Ctrl-D leaves\n")
        read = line_editor() if on_terminal else input
        unsaved = Unsaved(folder)
        with log_paused():
            Dialogue(
                conversation, read, on_terminal=on_terminal, unsaved=unsaved
            ).hold()
    return 0


def begin(
    checkpoint: Checkpoint, model: ModelConfig, chosen: ChatArguments
) -> tuple[Conversation, Params]:
    """Reads the tokenizer and the parameters, and begins a conversation."""
    tokenizer = checkpoint.tokenizer()
    # Raises before the weights are read.
    if turns_are_text(tokenizer):
        logger.warning(
            "this model's chat template ends a message by plain text, not by a special "
            "token: a message can contain a forged turn"
        )
    params = load_onto_mesh(checkpoint, chosen.weights, model.dtype)
    conversation = Conversation(
        *(model, params, tokenizer, with_stop_ids(chosen.sample, tokenizer)),
        jax.random.key(chosen.seed),
        system=chosen.system,
        cache=chosen.cache,
    )
    return conversation, params


def describe(checkpoint: Checkpoint, params: Params) -> str:
    """Formats `name.gguf: llama, 135M parameters, context of 8192 tokens`."""
    path = checkpoint.path
    return (
        f"{path.name if path.is_file() else path}: {checkpoint.family}, "
        f"{format_count(tree.count(params))} parameters, "
        f"context of {checkpoint.config.context_length} tokens"
    )


def log_attention(model: ModelConfig) -> None:
    """Logs the attention choice before the chat starts, so it doesn't interrupt it."""
    context = model.context_length
    for name, num_queries in (("prefill", context), ("decode", 1)):
        choices = attention_choices(
            model, 1, num_queries, context, is_empty=name == "prefill"
        )
        for kind, choice in choices.items():
            logger.info("attention of %s layers, %s: %s", kind, name, choice)
            if choice.warning is not None:
                logger.warning("attention, %s: %s", name, choice.warning)
