"""Answer requests over HTTP, as OpenAI's API does."""

import os
import sys

import jax
import uvicorn

from jaxlm.checkpoint.load import load_onto_mesh
from jaxlm.commands.generating.generation import open_with_dtype
from jaxlm.commands.process import use_compile_cache
from jaxlm.flags.arguments import ServeArguments
from jaxlm.infer.engine import Engine
from jaxlm.serve.app import Limits, Server
from jaxlm.serve.bodies import MAX_TOP_LOGPROBS
from jaxlm.serve.worker import Worker
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.terminal.progress import Waiting

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Answers have so long to end after the first Ctrl-C or SIGTERM.
_GRACE_SECONDS = 30


def main(chosen: ServeArguments) -> int:
    """Loads the model onto the devices requested and serves it until it is stopped."""
    use_compile_cache()
    api_key = chosen.api_key or os.environ.get("JAXLM_API_KEY")
    if chosen.host not in _LOOPBACK and not api_key:
        raise ValueError(
            f"--host {chosen.host} lets other machines in: give --api-key too, or set "
            "JAXLM_API_KEY"
        )
    checkpoint, model = open_with_dtype(chosen.src, chosen.dtype)
    max_length = min(chosen.max_length or model.context_length, model.context_length)
    with jax.set_mesh(make_mesh_of_size(chosen.mesh)):
        with Waiting("loading the model"):
            tokenizer = checkpoint.tokenizer()
            params = load_onto_mesh(checkpoint)
        worker = Worker(
            lambda: Engine(
                *(model, params),
                num_slots=chosen.slots,
                max_length=max_length,
                num_tokens=tokenizer.vocab_size,
                token_bytes=tokenizer.token_bytes,
                top_logprobs=min(MAX_TOP_LOGPROBS, tokenizer.vocab_size),
            ),
            chosen.max_requests,
        )
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
            host=chosen.host,
            port=chosen.port,
            log_level="warning",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        try:
            uvicorn.Server(config).run()
        finally:
            worker.stop()
    return 0
