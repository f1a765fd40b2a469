"""Answer requests over HTTP, as OpenAI's API does."""

import os
import re
import signal
import sys

import jax
import uvicorn

from jaxlm.checkpoint.load import load_onto_mesh
from jaxlm.commands.generating.generation import open_with_dtype, read_proposer
from jaxlm.commands.process import use_compile_cache
from jaxlm.flags.arguments import ServeArguments
from jaxlm.infer.slots.engine import Engine
from jaxlm.serve.app import Limits, Server
from jaxlm.serve.bodies import MAX_TOP_LOGPROBS
from jaxlm.serve.connections import bound, connection_options
from jaxlm.serve.worker import Worker
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.terminal.progress import Waiting

_KEY = re.compile("[!-~]+")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Tokens that answers grow by in a step. Where a token takes much longer than to hand it
# out, few at a time cost nothing, and a request that comes waits for no more.
_STEPS = {"cpu": 2}
# Tokens of prompts that are read between two steps of the answers that run. On a CPU
# more of them take as long for each, and all answers wait meanwhile.
_PROMPT_TOKENS = {"cpu": 128}
# How long answers may still run after the first Ctrl-C, SIGTERM or SIGHUP.
_GRACE_SECONDS = 30


def main(chosen: ServeArguments) -> int:
    """Loads the model onto the devices requested and serves it until it is stopped."""
    use_compile_cache()
    api_key = chosen.api_key
    if api_key is None:
        api_key = os.environ.get("JAXLM_API_KEY")
    if api_key is not None and not _KEY.fullmatch(api_key):
        # An empty one would let all in, as a variable that is not set.
        raise ValueError(
            "the API key, --api-key or JAXLM_API_KEY, is empty or has characters that "
            "a header cannot: give letters, digits and signs of ASCII without spaces"
        )
    if chosen.host not in _LOOPBACK and not api_key:
        raise ValueError(
            f"--host {chosen.host} lets other machines in: give --api-key too, or set "
            "JAXLM_API_KEY"
        )
    checkpoint, model = open_with_dtype(chosen.src, chosen.dtype)
    max_length = min(chosen.max_length or model.context_length, model.context_length)
    with (
        bound(chosen.host, chosen.port) as sockets,
        jax.set_mesh(make_mesh_of_size(chosen.mesh)),
    ):
        with Waiting("loading the model"):
            tokenizer = checkpoint.tokenizer()
            params = load_onto_mesh(checkpoint, chosen.weights, model.dtype)
            speculate = read_proposer(chosen.speculate, chosen.dtype, tokenizer)

        def make_engine() -> Engine:
            engine = Engine(
                *(model, params),
                num_slots=chosen.slots,
                max_length=max_length,
                num_tokens=tokenizer.vocab_size,
                token_bytes=tokenizer.token_bytes,
                top_logprobs=min(MAX_TOP_LOGPROBS, tokenizer.vocab_size),
                steps=_STEPS.get(jax.default_backend(), 4),
                prompt_tokens=_PROMPT_TOKENS.get(jax.default_backend(), 2048),
                speculate=speculate,
            )
            engine.compile()
            return engine

        worker = Worker(make_engine, chosen.max_requests)
        server = Server(
            *(chosen.name or checkpoint.path.name, model, tokenizer, worker),
            max_length=max_length,
            num_slots=chosen.slots,
            api_key=api_key,
            limits=Limits(seconds=float(chosen.max_seconds)),
        )
        print(f"http://{chosen.host}:{chosen.port}", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            server.app,
            log_level="warning",
            **connection_options(),
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        # A terminal that is closed ends it as SIGTERM does, but not under nohup.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            uvicorn.Server(config).run(sockets)
        finally:
            worker.stop()
    return 0
