"""Runs in a child process with 8 CPU devices: the same training on several meshes.

Usage: python mesh_case.py CASE FOLDER; prints one JSON object of differences.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from toy_case import make_batch, make_params, toy

from jaxlm import tree
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.integrity import state_hash
from jaxlm.config import (
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from jaxlm.infer.generate import generate
from jaxlm.interp.causes.patching import activation_patching
from jaxlm.model.params import parameter_shardings
from jaxlm.model.trace import absent_sites
from jaxlm.model.transformer import forward
from jaxlm.ops import collectives
from jaxlm.ops.attention import blocked
from jaxlm.ops.attention.dispatch import IMPLEMENTATIONS, Kernel
from jaxlm.ops.attention.tpu import pallas_tpu
from jaxlm.ops.attention.tpu.tpu_blocks import TpuSettings
from jaxlm.ops.embedding import lookup
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.plan.traffic import Part, traffic
from jaxlm.sharding import rules
from jaxlm.sharding.mesh import make_mesh
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.spikes import new_history
from jaxlm.train.state import TrainState, abstract_state
from jaxlm.train.step import loss_and_grads, make_train_step

ROWS, LENGTH, STEPS = 16, 32, 20
MESHES = {
    "one": {"data": 1},
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "fsdp2_tensor4": {"data": 1, "fsdp": 2, "tensor": 4},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor8": {"data": 1, "tensor": 8},  # more than key heads
}
CONTEXT_MESHES = {
    "fsdp4_context2": {"data": 1, "fsdp": 4, "context": 2},
    "context4_tensor2": {"data": 1, "context": 4, "tensor": 2},
    "context8": {"data": 1, "context": 8},
}
MODEL = toy(num_heads=8, num_kv_heads=4, qk_norm="head", vocab_size=64)
ODD = {"vocab_size": 65}  # no tensor axis divides it
EXPERT_MESHES = {
    "fsdp2_expert2_tensor2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "expert4_context2": {"data": 1, "expert": 4, "context": 2},
    "data2_expert4": {"data": 2, "expert": 4},
}
CONTEXT = {
    "layer_pattern": ("local", "global"),
    "window": 7,
    "attention_sinks": True,
}
EXPERTS = {
    "num_experts": 4,
    "experts_per_token": 2,
    "router_bias": True,
    "feed_forward_bias": True,
    "activation": "swiglu_clamped",
}


def mesh_of(name):
    config = MeshConfig(**(MESHES | CONTEXT_MESHES | EXPERT_MESHES)[name])
    return make_mesh(config, jax.devices()[:1] if name == "one" else None)


def config_of(optimizer="adamw", model=MODEL, **train):
    return Config(
        model=model,
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(
            name=optimizer, warmup_steps=0, learning_rate=3e-3, schedule="constant"
        ),
        train=TrainConfig(steps=STEPS, batch_size=ROWS, **train),
    )


def batch_of(step, mesh, rows=slice(None)):
    """Uneven weights: a mean of the shards' means would be another number."""
    batch = make_batch(MODEL, ROWS, LENGTH, seed=step)
    if rows != slice(None):
        weights = np.zeros_like(batch.loss_weights)
        weights[rows] = batch.loss_weights[rows]
        batch = dataclasses.replace(batch, loss_weights=weights)
    return jax.device_put(batch, rules.batch_sharding(mesh))


def state_on(config, mesh, move=0.0):
    """The same state on any mesh; `move` shifts one weight."""
    params = make_params(config.model)
    params["layers"]["attn"]["q"][0, 3, 1, 2] += move
    params = jax.device_put(params, parameter_shardings(params, mesh))
    optimizer = make_optimizer(config.optimizer, STEPS)
    opt_state = jax.jit(optimizer.init)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), jax.NamedSharding(mesh, jax.P()))
    return TrainState(step, params, opt_state), make_train_step(config, optimizer)


# One function, so that the controls compile nothing.
jitted_loss_and_grads = jax.jit(loss_and_grads, static_argnums=(0, 1))


def gradients(config, mesh, move=0.0, rows=slice(None)):
    with jax.set_mesh(mesh):
        state, _ = state_on(config, mesh, move)
        loss, grads, *_ = jitted_loss_and_grads(
            *(config.model, config.train, state.params, batch_of(0, mesh, rows))
        )
    for name, leaf in tree.flatten(grads).items():
        wanted = tree.flatten(state.params)[name].sharding
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
    return float(loss), {n: np.asarray(g) for n, g in tree.flatten(grads).items()}


def worst(one, other):
    """The largest difference of a leaf, as a share of the leaf's largest value."""
    return {
        name: float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max())
        for name in one
    }


def losses_on(config, mesh, steps=STEPS):
    with jax.set_mesh(mesh):
        state, train_step = state_on(config, mesh)
        losses = []
        for step in range(steps):
            state, metrics = train_step(state, batch_of(step, mesh))
            losses.append(float(metrics.loss))
    return losses, state


def difference(one, other):
    return float(np.abs(np.subtract(one, other)).max())


def case_gradients(names, changes=None, controls=True, **train):
    config = config_of(model=dataclasses.replace(MODEL, **(changes or {})), **train)
    loss, grads = gradients(config, mesh_of("one"))
    result = {"smallest_leaf": min(float(np.abs(g).max()) for g in grads.values())}
    for name in names:
        other_loss, other = gradients(config, mesh_of(name))
        result[name] = {"loss": abs(loss - other_loss), **worst(grads, other)}
    if not controls:
        return result
    last = mesh_of(names[-1])
    _, moved = gradients(config, last, move=0.05)
    result["control_moved"] = max(worst(grads, moved).values())
    _, half = gradients(config, last, rows=slice(ROWS // 2))
    result["control_half"] = max(worst(grads, half).values())
    return result


def shardings_of(state, mesh):
    """Names of optimizer leaves that do not lie as their parameter does."""
    params = {n: (p.shape, p.sharding) for n, p in tree.flatten(state.params).items()}
    wrong, moments = [], 0
    for name, leaf in tree.flatten(state.opt_state).items():
        if len(leaf.sharding.device_set) != mesh.size:
            wrong.append(name)
        for parameter, (shape, sharding) in params.items():
            if name.endswith("/" + parameter) and leaf.shape == shape:
                moments += 1
                if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                    wrong.append(name)
    return wrong, moments


def case_torus():
    """Gathers and scatters in stages, as on TPUs that form rings in 3 dimensions."""
    collectives._TORUS[jax.devices()[0].device_kind] = 3
    config, mesh = config_of(loss_chunk=24), mesh_of("fsdp8")
    with jax.set_mesh(mesh):
        state, train_step = state_on(config, mesh)
        text = train_step.lower(state, batch_of(0, mesh)).as_text()
    staged = "[[0, 1], [2, 3], [4, 5], [6, 7]]" in text
    return case_gradients(["fsdp8"], loss_chunk=24) | {"staged": staged}


def case_embedding():
    """Lookups, and gradients that two microbatches add up in a scan.

    The cotangents are integers, so that sums are exact in any order. TPU compilers
    have lost part of such sums (openxla/xla issue 49143).
    """
    random = np.random.default_rng(0)
    table = random.integers(-8, 8, (16, 32)).astype(np.float32)
    ids = random.integers(0, 16, (2, ROWS, 5), np.int32)
    cotangents = random.integers(-8, 8, (*ids.shape, 32)).astype(np.float32)
    wanted = np.zeros_like(table)
    np.add.at(wanted, ids, cotangents)
    result = {}

    def accumulated(table, ids, cotangents):
        def add(sums, microbatch):
            ids, cotangents = microbatch
            rows, backward = jax.vjp(lambda t: lookup(t, ids, jnp.bfloat16), table)
            return sums + backward(cotangents.astype(rows.dtype))[0], rows

        return jax.lax.scan(add, jnp.zeros_like(table), (ids, cotangents))

    for name in MESHES:
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            arguments = jax.device_put(
                (table, ids, cotangents),
                (P("tensor", "fsdp"), *[P(None, ("data", "fsdp"))] * 2),
            )
            step = jax.jit(accumulated).lower(*arguments).compile()
            gradient, rows = step(*arguments)
        result[name] = {
            "rows": bool((np.asarray(rows, np.float32) == table[ids]).all()),
            "gradient": float(np.abs(np.asarray(gradient) - wanted).max()),
            "sent": sum(t.bytes for t in traffic(step.as_text(), mesh.shape)),
        }
    result["largest"] = float(np.abs(wanted).max())
    return result


def case_losses(names, optimizer, changes=None, **train):
    model = dataclasses.replace(MODEL, **(changes or {}))
    config = config_of(optimizer, model, **train)
    reference, _ = losses_on(config_of(optimizer, model), mesh_of("one"))
    result = {"first": reference[0], "last": reference[-1]}
    for name in names:
        mesh = mesh_of(name)
        losses, state = losses_on(config, mesh)
        result[name] = difference(reference, losses)
        result[f"{name}_wrong"], result[f"{name}_moments"] = shardings_of(state, mesh)
        with jax.set_mesh(mesh):
            wanted = abstract_state(
                config.model, make_optimizer(config.optimizer, STEPS), mesh
            )
        result[f"{name}_abstract"] = [
            leaf_name
            for leaf_name, leaf in tree.flatten(state).items()
            if not leaf.sharding.is_equivalent_to(
                tree.flatten(wanted)[leaf_name].sharding, leaf.ndim
            )
        ]
        result[f"{name}_bytes"] = sum(
            leaf.addressable_shards[0].data.nbytes
            for leaf in jax.tree.leaves(state.opt_state)
        ) / tree.num_bytes(state.opt_state)
    return result


def case_resume(folder, others, optimizer="adamw"):
    """Saved on one mesh after 4 steps, restored on others, then 4 more steps."""
    config, saved = config_of(optimizer), 4
    same = {"tokenizer_fingerprint": ByteTokenizer().fingerprint}
    same |= {"data_fingerprint": "data", "config": config}
    mesh = mesh_of("2x2x2")
    _, state = losses_on(config, mesh, saved)
    with CheckpointManager(folder) as checkpoints:
        checkpoints.save(
            *(saved, state.params, state.opt_state),
            config=config,
            tokenizer=ByteTokenizer(),
            data_fingerprint="data",
            finite=True,
        )
    before = {n: np.asarray(x) for n, x in tree.flatten(state.params).items()}
    reference, _ = losses_on(config, mesh, saved + 4)
    result, said = {}, []
    optimizer = make_optimizer(config.optimizer, STEPS)
    for name in ("2x2x2", *others, "control"):
        mesh = mesh_of("fsdp8" if name == "control" else name)
        with (
            jax.set_mesh(mesh),
            CheckpointManager(folder, report=said.append) as checkpoints,
        ):
            wanted = abstract_state(config.model, optimizer, mesh)
            restored = checkpoints.restore(wanted.params, wanted.opt_state, **same)
            after = tree.flatten(restored.params)
            equal = all((np.asarray(after[n]) == x).all() for n, x in before.items())
            opt_state = restored.opt_state
            if name == "control":  # the moments lost
                opt_state = jax.jit(optimizer.init)(restored.params)
            step = jax.device_put(jnp.int32(saved), wanted.step.sharding)
            state = TrainState(step, restored.params, opt_state)
            train_step, losses = make_train_step(config, optimizer), []
            for number in range(saved, saved + 4):
                state, metrics = train_step(state, batch_of(number, mesh))
                losses.append(float(metrics.loss))
        result[name] = difference(reference[saved:], losses)
        result[f"{name}_equal"] = equal
    result["said"] = said
    return result


def case_skips(folder):
    """NaN in one row, so on some devices: all of them skip the step."""
    result, same = {}, {"data_fingerprint": "data"}
    for name, optimizer in (("fsdp8", "adamw"), ("2x2x2", "muon")):
        config, mesh = config_of(optimizer, skip_spikes=2), mesh_of(name)
        with jax.set_mesh(mesh):
            bad = make_batch(MODEL, ROWS, LENGTH, seed=9)
            bad.loss_weights[1] = np.nan
            bad = jax.device_put(bad, rules.batch_sharding(mesh))
            good = [batch_of(step, mesh) for step in range(2)]
            hashes = []
            for batches in (good, [good[0], bad, bad, good[1]]):
                state, train_step = state_on(config, mesh)
                history = new_history(state.step.sharding)
                state = dataclasses.replace(state, spikes=history)
                for batch in batches:
                    state, metrics = train_step(state, batch)
                hashes.append(state_hash([state.params, state.opt_state]))
            trees = (state.params, state.opt_state, state.spikes)
            with CheckpointManager(Path(folder) / name) as checkpoints:
                checkpoints.save(
                    *(4, *trees),
                    **{"config": config, "tokenizer": ByteTokenizer(), "finite": True},
                    **same,
                )
                restored = checkpoints.restore(
                    *trees,
                    **{"config": config, **same},
                    tokenizer_fingerprint=ByteTokenizer().fingerprint,
                )
        result[name] = {
            "same": hashes[0] == hashes[1],
            "skipped": int(restored.spikes.skipped),
            "in_a_row": int(metrics.skipped),
            "restored": state_hash([*trees])
            == state_hash([*vars(restored).values()][1:]),
            "devices": len(restored.spikes.losses.sharding.device_set),
        }
    return result


def case_generate(names):
    prompts = [[1, 2, 3], [4] * 9, [5, 6]]  # 3 rows on 8 parts: padded inside
    model, result = dataclasses.replace(MODEL, **ODD), {}
    model = dataclasses.replace(model, layer_pattern=("local", "global"), window=5)
    for temperature in (0.0, 1.0):
        # Every row beside rows with other rules.
        rules = {"temperature": temperature, "max_new_tokens": 20}
        rules = [rules, rules | {"top_p": 0.9}, rules | {"repetition_penalty": 1.5}]
        sample = [SampleConfig(**fields) for fields in rules]
        tokens = {}
        for name in ("one", *names):
            mesh = mesh_of(name)
            with jax.set_mesh(mesh):
                params = make_params(model, std=0.5)
                params = jax.device_put(params, parameter_shardings(params, mesh))
                call = (sample, jax.random.key(0))
                out = generate(model, params, prompts, *call, return_state=True)
                more = [
                    [*prompt, *new, 7]
                    for prompt, new in zip(prompts, out.tokens.tolist(), strict=True)
                ]
                next_out = generate(model, params, more, *call, resume=out.state)
                if name == "2x2x2":
                    # One prompt after another, into slots of a batch that runs.
                    # In a cache of 37 tokens for half of the layers.
                    slots = generate(
                        *(model, params, prompts, *call), num_slots=1, cache="ring_int8"
                    )
                    ring = generate(model, params, prompts, *call, cache="ring")
                    assert (ring.tokens == out.tokens).all()
                    assert (slots.tokens == out.tokens).mean() > 0.5
            assert next_out.prefill_tokens.tolist() == [1, 1, 1]
            tokens[name] = np.concatenate([out.tokens, next_out.tokens], axis=1)
        for name in names:
            same = bool((tokens[name] == tokens["one"]).all())
            result[f"{name}_{temperature}"] = same
        result[f"different_{temperature}"] = len(np.unique(tokens["one"]))
    return result


def case_edits(names, changes=None):
    """Every site edited at once: logits, every site as edited, and a gradient."""
    model = dataclasses.replace(MODEL, **changes or {})
    absent = absent_sites(model)
    sites = [s for s in SITES if s not in absent and SITES[s].edit_instead is None]
    sites.remove("tokens")
    vector = jnp.linspace(-1, 1, model.model_dim)
    reduced = {
        "attn_out": Tap("attn_out", reduce="dot", direction=vector),
        "v": Tap("v", reduce="top_k", count=2),
        "logits": Tap("logits", reduce="top_k", count=3),
    }
    taps = tuple(reduced.get(site, Tap(site)) for site in SITES if site not in absent)

    def run(params, tokens, amount):
        edits = [
            Edit(
                site,
                "add",
                amount * vector if SITES[site].shape == "B T D" else amount,
                layer=None if SITES[site].outside_layers else 1,
                position=[3, 8],
            )
            for site in sites
        ]
        edits.append(Edit("resid_post", "project_out", vector))
        edits.append(Edit("z", "scale", 0.5, layer=0, head=[1, 4]))
        edits.append(Edit("mlp_out", "set", 0.0, layer=0, position=2))
        out = forward(model, params, tokens, taps=taps, edits=edits)
        loss = jnp.mean(jnp.square(out.logits))
        return loss, (out.trace, out.hits)

    values = {}
    for name in ("one", *names):
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            params = make_params(model, std=0.3)
            params = jax.device_put(params, parameter_shardings(params, mesh))
            tokens = batch_of(0, mesh).tokens
            call = jax.jit(jax.value_and_grad(run, argnums=2, has_aux=True))
            (_, (trace, hits)), grad = call(params, tokens, 0.1)
        assert min(map(int, hits)) > 0
        named = [
            ("/".join(map(str, path)), np.asarray(leaf))
            for path, leaf in jax.tree.leaves_with_path({**trace, "gradient": grad})
        ]
        values[name] = dict(named)
    return {name: worst(values[name], values["one"]) for name in names}


def case_inside(names):
    """A sweep of patches, and what taps read while generating."""
    taps = (Tap("resid_post"), Tap("attn_probs", (1,)), Tap("logits"))
    tokens = np.arange(16).reshape(2, 8) % 7
    greedy = SampleConfig(temperature=0.0, max_new_tokens=3)
    values = {}
    for name in ("one", *names):
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            params = make_params(MODEL, std=0.3)
            params = jax.device_put(params, parameter_shardings(params, mesh))
            read = jax.jit(lambda p, x: forward(MODEL, p, x, taps=taps[:1]).trace)
            source = read(params, tokens[::-1])["resid_post"]
            patch = partial(
                activation_patching,
                MODEL,
                lambda y: y[0, 3] - y[1, 4],
                site=taps[0].site,
            )
            grid = np.asarray(jax.jit(patch)(params, tokens, source))
            out = generate(MODEL, params, tokens, greedy, taps=taps)
        values[name] = {"patches": grid, "tokens": out.tokens, **out.traces[1]}
    return {name: worst(values[name], values["one"]) for name in names}


def case_errors():
    result = {}
    mesh, model = mesh_of("tensor8"), toy(num_heads=4)
    with jax.set_mesh(mesh):
        try:
            abstract_state(model, make_optimizer(OptimizerConfig(), 100), mesh)
        except ValueError as error:
            result["divide"] = str(error)
    for name, sizes in (("fit", {"data": 3}), ("remain", {"fsdp": 3})):
        try:
            make_mesh(MeshConfig(**sizes))
        except ValueError as error:
            result[name] = str(error)
    return result


class Interpreted(Kernel):
    """The TPU's kernel on any device."""

    def run(self, q, k, v, spec):
        settings = TpuSettings(16, 16, 16, 16, interpret=True)
        return pallas_tpu.attention(q, k, v, spec, settings=settings)

    def declines(self, asked):
        return None


def case_kernel():
    """A kernel is cut over the batch and the heads, with all that the spec holds.

    The loss goes through chunks of the tokens of each device.
    """
    IMPLEMENTATIONS["pallas_tpu"] = Interpreted("", "cpu")
    changes = {"attention": "pallas_tpu", "attention_sinks": True}
    return case_gradients(["2x2x2"], changes, loss_chunk=24, z_loss=0.01)


def case_exchanged():
    """Experts on several devices; and what a device sends in one of the meshes."""
    train = {"load_balance_loss": 0.1}
    names = ["fsdp2_expert2_tensor2", "expert4_context2"]
    result = case_gradients(names, EXPERTS | CONTEXT, **train)
    # Here no gradient is added up along the axis of the experts alone.
    mesh = mesh_of("data2_expert4")
    # Without biases, whose gathered vectors would count as weights.
    model = dataclasses.replace(
        MODEL, num_experts=4, experts_per_token=2, num_layers=1, remat="none"
    )
    config = config_of(model=model, **train)
    with jax.set_mesh(mesh):
        state, _ = state_on(config, mesh)
        arguments = (state.params, batch_of(0, mesh))
        lowered = jitted_loss_and_grads.lower(model, config.train, *arguments)
        sent = traffic(lowered.compile().as_text(), mesh.shape)
    result["sent"] = [
        (t.part, t.bytes)
        for t in sent
        if t.axes == ("expert",) or (t.part == Part.EXPERT)
    ]
    return result


def case_context():
    """A ring, with blocks no larger than these rows need."""
    blocked.settings_for = lambda q: blocked.BlockedSettings(8)
    changes = CONTEXT | ODD | {"context_attention": "ring"}
    return case_gradients(list(CONTEXT_MESHES), changes, loss_chunk=24, z_loss=0.01)


def main():
    case, folder = sys.argv[1:]
    all_meshes = list(MESHES)[1:]
    four = [name for name in all_meshes if name != "tensor8"]
    cases = {
        "embedding": case_embedding,
        "torus": case_torus,
        "errors": case_errors,
        "experts": lambda: case_gradients(four, EXPERTS, load_balance_loss=0.1),
        "gradients": lambda: case_gradients(all_meshes, ODD),
        "blocked": lambda: case_gradients(["data8", "2x2x2"], {"attention": "xla"}),
        "kernel": case_kernel,
        "context": case_context,
        "exchanged": case_exchanged,
        "adamw": lambda: case_losses(four, "adamw"),
        "muon": lambda: case_losses(["fsdp8", "2x2x2"], "muon"),
        "experts_adamw": lambda: case_losses(["fsdp8"], "adamw", EXPERTS),
        "experts_muon": lambda: case_losses(["2x2x2"], "muon", EXPERTS),
        "adafactor": lambda: case_losses(["2x2x2"], "adafactor"),
        "accumulation": lambda: case_losses(
            *(["2x2x2", "fsdp2_tensor4"], "adamw", ODD),
            **{"accumulation_steps": 2, "accumulate_whole": True, "loss_chunk": 64},
        ),
        "skips": lambda: case_skips(folder),
        "resume": lambda: case_resume(
            folder, ["one", "data8", "fsdp8", "fsdp2_tensor4", "tensor8"]
        ),
        "resume_muon": lambda: case_resume(folder, ["one", "fsdp8"], "muon"),
        "edits": lambda: case_edits(["fsdp2_tensor4", "2x2x2"]),
        "edits_experts": lambda: case_edits(["2x2x2"], EXPERTS),
        "inside": lambda: case_inside(["fsdp2_tensor4"]),
        "generate": lambda: case_generate(all_meshes),
    }
    print(json.dumps(cases[case]()))


if __name__ == "__main__":
    main()
