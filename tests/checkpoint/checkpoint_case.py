"""A small run for checkpoint tests, also imported by their child processes."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from forked_case import Forked

from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.config import Config, ModelConfig, OptimizerConfig
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

CONFIG = Config(
    model=ModelConfig(
        vocab_size=64,
        num_layers=2,
        model_dim=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        hidden_dim=32,
        context_length=256,
    ),
    optimizer=OptimizerConfig(warmup_steps=3),
)


class FakeTokenizer(ByteTokenizer):
    fingerprint = "tokenizer-1"


def make_params(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return {
        "embed": {"table": jax.random.normal(next(keys), (64, 16))},
        "final_norm": {"scale": jax.random.normal(next(keys), (16,))},
        "layers": {
            "attn": {n: jax.random.normal(next(keys), (2, 16, 2, 8)) for n in "qkv"},
            "mlp": {"up": jax.random.normal(next(keys), (2, 16, 32))},
        },
    }


def adamw_masked():
    """Has EmptyState, MaskedNode, ScaleByAdamState and a scalar in its state."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.masked(
            optax.trace(0.9), {"embed": True, "final_norm": False, "layers": False}
        ),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
    )


def two_optimizers():
    return optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.lion(1e-3, mu_dtype=jnp.bfloat16)},
        {"embed": "a", "final_norm": "b", "layers": "b"},
    )


def updated_state(optimizer, seed=0):
    def update(seed):
        params, gradients = make_params(seed), make_params(seed + 1)
        start = optimizer.init(params)
        updates, state = optimizer.update(gradients, start, params)
        return optax.apply_updates(params, updates), state

    # As one program: op by op, each shape would be compiled.
    return jax.jit(update)(seed)


def state_of_step(step):
    """Makes a state in which every number is the step, without compiling anything."""
    params = jax.eval_shape(make_params)
    state = params, jax.eval_shape(adamw_masked().init, params)
    return jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, step, x.dtype)), state)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def save(
    checkpoints,
    step,
    state=None,
    wait=True,
    config=CONFIG,
    tokenizer=None,
):
    params, opt_state = state_of_step(step) if state is None else state
    checkpoints.save(
        step,
        params,
        opt_state,
        config=config,
        tokenizer=tokenizer or FakeTokenizer(),
        data_fingerprint="data-1",
    )
    if wait:
        checkpoints.wait()


def restore(checkpoints, state=None, step=None, config=CONFIG, **fingerprints):
    params, opt_state = abstract(state_of_step(0)) if state is None else state
    kwargs = {
        "config": config,
        "tokenizer_fingerprint": "tokenizer-1",
        "data_fingerprint": "data-1",
        **fingerprints,
    }
    return checkpoints.restore(params, opt_state, step=step, **kwargs)


def run_with_steps(folder, *steps, **kwargs):
    with CheckpointManager(folder, keep=len(steps), **kwargs) as checkpoints:
        for step in steps:
            save(checkpoints, step)
    return Path(folder)


def run_code(code, *arguments):
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def start_child(code, folder, *arguments, **environment):
    """Starts a process that runs `code`, whose first argument is a folder."""
    return Forked(
        *(run_code, code, str(folder), *map(str, arguments)),
        output=f"{folder}.child",
        environment={**os.environ, **environment},
        folder=Path(folder).parent,
    )


def run_child(code, folder, *arguments, **environment):
    child = start_child(code, folder, *arguments, **environment)
    assert child.wait() is not None
    return child.code, child.out, child.err
