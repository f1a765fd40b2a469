"""Runs in a child process with 8 CPU devices: the same training on several meshes.

`main` prints one JSON object of differences.
"""

import dataclasses
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from toy_case import make_batch, make_params, toy

from jaxlm import torus, tree
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
from jaxlm.infer.scoring import score
from jaxlm.interp.causes.patching import activation_patching
from jaxlm.interp.sentence_view import sentence_view
from jaxlm.model.params import parameter_shardings, quantize_matrices
from jaxlm.model.trace import absent_sites
from jaxlm.model.transformer import forward
from jaxlm.ops import rings
from jaxlm.ops.attention import blocked
from jaxlm.ops.attention.dispatch import IMPLEMENTATIONS, Kernel
from jaxlm.ops.attention.tpu import pallas_tpu
from jaxlm.ops.attention.tpu.tpu_blocks import TpuSettings
from jaxlm.ops.embedding import lookup
from jaxlm.ops.orthogonalize import orthogonalize
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.plan.traffic import Part, traffic
from jaxlm.report.look.make_view import view_of
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
    "fsdp2_context2_tensor2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    "context4_tensor2": {"data": 1, "context": 4, "tensor": 2},
    "context8": {"data": 1, "context": 8},
}
MODEL = toy(num_heads=8, num_kv_heads=4, qk_norm="head", vocab_size=64)
ODD = {"vocab_size": 65}  # no tensor axis divides it
EXPERT_MESHES = {
    "fsdp2_expert2_tensor2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "fsdp2_expert2_context2": {"data": 1, "fsdp": 2, "expert": 2, "context": 2},
    "expert4_context2": {"data": 1, "expert": 4, "context": 2},
    "data2_expert4": {"data": 2, "expert": 4},
    "data2_fsdp2_expert2": {"data": 2, "fsdp": 2, "expert": 2},
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


def params_on(config, mesh, move=0.0):
    """The same parameters on any mesh; `move` shifts one weight."""
    params = make_params(config.model)
    params["layers"]["attn"]["q"][0, 3, 1, 2] += move
    return jax.device_put(params, parameter_shardings(params, mesh))


@cache
def programs(config):
    """The optimizer's `init` and the training step, for all meshes."""
    optimizer = make_optimizer(config.optimizer, STEPS)
    return jax.jit(optimizer.init), make_train_step(config, optimizer)


def state_on(config, mesh):
    params = params_on(config, mesh)
    start, train_step = programs(config)
    step = jax.device_put(jnp.zeros((), jnp.int32), jax.NamedSharding(mesh, jax.P()))
    return TrainState(step, params, start(params)), train_step


@cache
def compiled_gradients(config, mesh):
    """Once for each mesh, so that the controls compile nothing."""
    step = jax.jit(partial(loss_and_grads, config.model, config.train))
    return step.lower(params_on(config, mesh), batch_of(0, mesh)).compile()


def gradients(config, mesh, move=0.0, rows=slice(None)):
    with jax.set_mesh(mesh):
        params = params_on(config, mesh, move)
        step = compiled_gradients(config, mesh)
        loss, grads, *_ = step(params, batch_of(0, mesh, rows))
    for name, leaf in tree.flatten(grads).items():
        wanted = tree.flatten(params)[name].sharding
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
    return float(loss), {n: np.asarray(g) for n, g in tree.flatten(grads).items()}


def tensor_sent(config, mesh):
    """What a device sends of the activations of a layer, as a multiple of them."""
    shape, model = mesh.shape, config.model
    rows = ROWS // (shape["data"] * shape["fsdp"] * shape["expert"])
    activations = 4 * rows * LENGTH // shape["context"] * model.model_dim
    sent = traffic(compiled_gradients(config, mesh).as_text(), shape)
    total = sum(t.bytes for t in sent if t.part == Part.TENSOR)
    return total / model.num_layers / activations


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


def case_gradients(
    names, changes=None, controls=True, cut=(), on_torus=(), dimensions=3, **train
):
    """In the meshes of `cut` the residual stream is cut over `tensor`.

    Those of `on_torus` are on one of as many dimensions.
    """
    model = dataclasses.replace(MODEL, **(changes or {}))
    config = config_of(model=model, **train)
    loss, grads = gradients(config, mesh_of("one"))
    result = {"smallest_leaf": min(float(np.abs(g).max()) for g in grads.values())}
    for name in names:
        model = dataclasses.replace(model, sequence_parallel=name in cut)
        config = dataclasses.replace(config, model=model)
        use_torus(dimensions if name in on_torus else 1)
        other_loss, other = gradients(config, mesh_of(name))
        result[name] = {"loss": abs(loss - other_loss), **worst(grads, other)}
        result[f"{name}_exchanges"] = exchanges(config, mesh_of(name))
        result[f"{name}_sent"] = tensor_sent(config, mesh_of(name))
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


def use_torus(dimensions):
    """With several, gathers and scatters by permutes, as on TPUs that form rings."""
    kind = jax.devices()[0].device_kind
    torus._DIMENSIONS[kind] = dimensions
    torus._PERMUTES_BESIDE.add(kind)


def exchanges(config, mesh):
    """By what operations weights and gradients of layers travel along `fsdp` alone.

    Norms are whole on each device; their gradients are reduced.
    """
    sent = traffic(compiled_gradients(config, mesh).as_text(), mesh.shape)
    parts = Part.LAYER_WEIGHTS, Part.GRADIENTS
    along = [t for t in sent if t.part in parts and t.axes == ("fsdp",)]
    return sorted({t.kind for t in along} - {"all-reduce"})


def case_torus():
    """In each layer; and once for two microbatches, beside which one device has one."""
    result = case_gradients(["2x2x2"], on_torus=["2x2x2"], loss_chunk=24)
    mesh = mesh_of("fsdp8")
    _, grads = gradients(config_of(loss_chunk=24), mesh_of("one"))
    once = {"accumulation_steps": 2, "accumulate_whole": True, "loss_chunk": 24}
    _, other = gradients(config_of(**once), mesh)
    _, moved = gradients(config_of(**once), mesh, move=0.05)
    result["control_once"] = max(worst(grads, moved).values())
    result["exchanges"] = exchanges(config_of(**once), mesh)
    return result | {"fsdp8": worst(grads, other)}


def case_rings():
    """What rings compute, and how many permutes a step has where gathers are not kept."""
    use_torus(3)
    model = dataclasses.replace(MODEL, remat="none")
    config, mesh = config_of(model=model, loss_chunk=24), mesh_of("2x2x2")
    with jax.set_mesh(mesh):
        step = jax.jit(partial(loss_and_grads, config.model, config.train))
        text = step.lower(params_on(config, mesh), batch_of(0, mesh)).as_text()
    return {
        "differences": [ring_differences(*r) for r in ((8, 1), (4, 2), (2, 4))],
        "permutes": text.count("collective_permute"),
    }


def ring_differences(size, stride):
    """How far what rings compute is from XLA's gathers and scatters; of integers."""
    ring, mesh = rings.Ring(("fsdp",), size, stride), mesh_of("fsdp8")
    devices = np.arange(8).reshape(-1, size, stride).swapaxes(1, 2)
    options = {"axis_name": "fsdp", "tiled": True}
    options["axis_index_groups"] = devices.reshape(-1, size).tolist()

    def difference(x):
        pairs = [
            (
                partial(rings.gather_around, ring, 1),
                partial(jax.lax.all_gather, axis=1, **options),
            ),
            (
                partial(rings.scatter_around, ring, 1),
                partial(jax.lax.psum_scatter, scatter_dimension=1, **options),
            ),
        ]
        found = []
        for ours, wanted in pairs:
            (y, back), (z, wanted_back) = jax.vjp(ours, x), jax.vjp(wanted, x)
            found += [y - z, back(y)[0] - wanted_back(y)[0]]
        return jnp.stack([jnp.abs(each).max() for each in found])[None]

    x = np.random.default_rng(0).integers(-9, 9, (8, 8, 3)).astype(np.float32)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, P("fsdp"))
        run = jax.shard_map(difference, out_specs=P("fsdp"), check_vma=False)
        return float(jax.jit(run)(x).max())


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


def case_orthogonalize():
    """Matrices of 8 layers that two axes cut; what is sent, as a multiple of them."""
    x = np.random.default_rng(0).normal(size=(8, 4, 6, 16)).astype(np.float32)
    inputs, outputs, eps = (1, 2), (3,), 1e-8
    wanted = orthogonalize(jnp.asarray(x), inputs, outputs, eps)
    mesh = mesh_of("fsdp2_tensor4")
    with jax.set_mesh(mesh):
        cut = jax.device_put(x, P(None, "tensor", None, "fsdp"))
        run = jax.jit(partial(orthogonalize, inputs=inputs, outputs=outputs, eps=eps))
        run = run.lower(cut).compile()
        found = run(cut)
        sent = sum(t.bytes for t in traffic(run.as_text(), mesh.shape))
    return {
        "difference": float(np.abs(np.asarray(found) - wanted).max()),
        "cut": found.sharding.is_equivalent_to(cut.sharding, x.ndim),
        "sent": sent / cut.addressable_shards[0].data.nbytes,
    }


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


def case_resume(folder, first, others, optimizer="adamw"):
    """Saved on one mesh after 4 steps, restored on it and others, then 4 more steps."""
    config, saved = config_of(optimizer, dataclasses.replace(MODEL, **ODD)), 4
    same = {"tokenizer_fingerprint": ByteTokenizer().fingerprint}
    same |= {"data_fingerprint": "data", "config": config}
    mesh = mesh_of(first)
    _, state = losses_on(config, mesh, saved)
    with CheckpointManager(folder) as checkpoints:
        checkpoints.save(
            *(saved, state.params, state.opt_state),
            config=config,
            tokenizer=ByteTokenizer(),
            data_fingerprint="data",
        )
    before = {n: np.asarray(x) for n, x in tree.flatten(state.params).items()}
    reference, _ = losses_on(config, mesh, saved + 4)
    result, said = {}, []
    optimizer = make_optimizer(config.optimizer, STEPS)
    start, train_step = programs(config)
    for name in (first, *others, "control"):
        mesh = mesh_of(others[-1] if name == "control" else name)
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
                opt_state = start(restored.params)
            step = jax.device_put(jnp.int32(saved), wanted.step.sharding)
            state = TrainState(step, restored.params, opt_state)
            losses = []
            for number in range(saved, saved + 4):
                state, metrics = train_step(state, batch_of(number, mesh))
                losses.append(float(metrics.loss))
        result[name] = difference(reference[saved:], losses)
        result[f"{name}_equal"] = equal
    result["said"] = said
    return result


def case_skips(folder):
    """NaN in one row, so on some devices: all of them skip the step."""
    same = {"data_fingerprint": "data"}
    config, mesh = config_of(skip_spikes=2), mesh_of("2x2x2")
    with jax.set_mesh(mesh):
        bad = make_batch(MODEL, ROWS, LENGTH, seed=9)
        bad.loss_weights[1] = np.nan
        bad = jax.device_put(bad, rules.batch_sharding(mesh))
        good = [batch_of(step, mesh) for step in range(2)]
        hashes = []
        _, train_step = state_on(config, mesh)
        for batches in (good, [good[0], bad, bad, good[1]]):
            state, _ = state_on(config, mesh)
            history = new_history(state.step.sharding)
            state = dataclasses.replace(state, spikes=history)
            for batch in batches:
                state, metrics = train_step(state, batch)
            hashes.append(state_hash([state.params, state.opt_state]))
        trees = (state.params, state.opt_state, state.spikes)
        with CheckpointManager(folder) as checkpoints:
            checkpoints.save(
                *(4, *trees),
                **{"config": config, "tokenizer": ByteTokenizer()},
                **same,
            )
            restored = checkpoints.restore(
                *trees,
                **{"config": config, **same},
                tokenizer_fingerprint=ByteTokenizer().fingerprint,
            )
    return {
        "same": hashes[0] == hashes[1],
        "skipped": int(restored.spikes.skipped),
        "in_a_row": int(metrics.skipped_in_a_row),
        "restored": state_hash([*trees]) == state_hash([*vars(restored).values()][1:]),
        "devices": len(restored.spikes.losses.sharding.device_set),
    }


def case_generate(names):
    prompts = [[1, 2, 3], [4] * 9, [5, 6]] * 2  # 6 rows on 8 parts: padded inside
    # `case_inside` generates with two layers that see all.
    model = dataclasses.replace(MODEL, **ODD, num_layers=1)
    model = dataclasses.replace(model, layer_pattern=("local",), window=5)
    result = {}
    # Every row beside rows with other rules.
    rules = [{}, {"top_p": 0.9}, {"repetition_penalty": 1.5}]
    sample = [
        SampleConfig(temperature=temperature, max_new_tokens=20, **fields)
        for temperature in (0.0, 1.0)
        for fields in rules
    ]
    tokens, resumed = {}, {}
    for name in ("one", *names):
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            params = make_params(model, std=0.5)
            params = jax.device_put(params, parameter_shardings(params, mesh))
            call = (sample, jax.random.key(0))
            # In a cache of 37 tokens.
            cache = "ring" if name == "tensor8" else "full"
            out = generate(
                *(model, params, prompts, *call), return_state=True, cache=cache
            )
            tokens[name] = out.tokens
            if name in ("one", "2x2x2"):
                more = [
                    [*prompt, *new, 7]
                    for prompt, new in zip(prompts, out.tokens.tolist(), strict=True)
                ]
                next_out = generate(model, params, more, *call, resume=out.state)
                assert next_out.prefill_tokens.tolist() == [1] * 6
                resumed[name] = next_out.tokens
            if name == "2x2x2":
                # One prompt after another, into slots of a batch that runs.
                slots = generate(
                    *(model, params, prompts, *call), num_slots=1, cache="ring_int8"
                )
                assert (slots.tokens == out.tokens).mean() > 0.5
                quantized = score(model, quantize_matrices(params, "int8"), prompts)
    for name in names:
        result[name] = bool((tokens[name] == tokens["one"]).all())
    result["resumed"] = bool((resumed["2x2x2"] == resumed["one"]).all())
    params = jax.tree.map(jnp.asarray, make_params(model, std=0.5))
    params = quantize_matrices(params, "int8")
    pairs = zip(quantized, score(model, params, prompts), strict=True)
    result["int8"] = all(np.allclose(*pair, rtol=0, atol=1e-5) for pair in pairs)
    halves = np.split(tokens["one"], 2)
    result["different"] = [len(np.unique(half)) for half in halves]
    return result


def case_edits(names, changes=None, differentiate=True):
    """Every site edited at once: logits, every site as edited, and a gradient."""
    model = dataclasses.replace(MODEL, sequence_parallel=True, **changes or {})
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
            call = run
            if differentiate:
                call = jax.grad(run, argnums=2, has_aux=True)
            scalar, (trace, hits) = jax.jit(call)(params, tokens, 0.1)
        assert min(map(int, hits)) > 0
        named = [
            ("/".join(map(str, path)), np.asarray(leaf))
            for path, leaf in jax.tree.leaves_with_path({**trace, "scalar": scalar})
        ]
        values[name] = dict(named)
    return {name: worst(values[name], values["one"]) for name in names}


def case_inside(names):
    """A sweep of patches, what taps read while generating, a look, and a page.

    The page's mesh leaves it to the compiler how values are cut, as `jaxlm look` does.
    """
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
            rows = jnp.tile(tokens[:1], (rules.batch_parts(), 1))
            look = jax.jit(partial(sentence_view, MODEL), static_argnums=2)
            look = look(params, jax.device_put(rows, rules.batch_sharding(mesh)), 4)
        auto = Mesh(mesh.devices, mesh.axis_names, (AxisType.Auto,) * mesh.devices.ndim)
        with jax.set_mesh(auto):
            params = jax.device_put(params, parameter_shardings(params, auto))
            page = view_of(MODEL, params, ByteTokenizer(), tokens[0])
        values[name] = {
            **{"patches": grid, "tokens": out.tokens, **out.traces[1]},
            **jax.tree.map(np.asarray, look._asdict()),
            **{"read": page.cache.read, "probabilities": page.answer.probabilities},
            **{"parts": page.causes.parts, "heads": page.causes.heads},
            "ablation": page.causes.ablation,
        }
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
    train = {"loss_chunk": 24, "z_loss": 0.01}
    return case_gradients(["2x2x2"], changes, cut=["2x2x2"], **train)


def case_exchanged():
    """Experts on several devices; and in one of the meshes what a device sends.

    There in two microbatches, whose load-balance loss is one of the rows of all devices.
    """
    train = {"load_balance_loss": 0.1}
    names = ["fsdp2_expert2_tensor2", "fsdp2_expert2_context2"]
    changes = EXPERTS | CONTEXT | {"layer_pattern": ("local",)}
    result = case_gradients(names, changes, on_torus=names[1:], **train)
    use_torus(1)
    mesh = mesh_of("data2_expert4")
    model = dataclasses.replace(MODEL, **EXPERTS, num_layers=1, remat="none")
    config = config_of(model=model, accumulation_steps=2, **train)
    meshes = (mesh_of("one"), mesh, mesh_of("data2_fsdp2_expert2"))
    grads = [gradients(config, m)[1] for m in meshes]
    result["accumulated"] = [max(worst(grads[0], g).values()) for g in grads[1:]]
    sent = traffic(compiled_gradients(config, mesh).as_text(), mesh.shape)
    result["sent"] = sum(t.bytes for t in sent if t.part == Part.EXPERT)
    # Along the axis of the experts, the gradients of all other weights.
    others = [t for t in sent if "expert" in t.axes and t.part != Part.EXPERT]
    result["sent_others"] = sum(t.bytes for t in others)
    result["other_weights"] = sum(
        x.size for name, x in grads[0].items() if x.shape[1:2] != (4,)
    )
    result["sent_after_each"] = sum(t.bytes for t in others if t.times > 1)
    return result


def case_context(names):
    """A ring, with blocks no larger than these rows need."""
    blocked.settings_for = lambda q: blocked.BlockedSettings(8)
    changes = CONTEXT | ODD | {"context_attention": "ring"}
    train = {"loss_chunk": 24, "z_loss": 0.01}
    return case_gradients(names, changes, cut=names, **train)


def main(case, folder):
    cases = {
        "embedding": case_embedding,
        "orthogonalize": case_orthogonalize,
        "torus": case_torus,
        "flat torus": lambda: case_gradients(
            ["fsdp8", "2x2x2"],
            on_torus=["fsdp8", "2x2x2"],
            dimensions=2,
            loss_chunk=24,
        ),
        "rings": case_rings,
        "errors": case_errors,
        "experts": lambda: case_gradients(
            *(["fsdp2_tensor4"], EXPERTS | {"attention": "xla"}),
            cut=["fsdp2_tensor4"],
            load_balance_loss=0.1,
        ),
        "gradients": lambda: case_gradients(
            ["data8", "fsdp8", "fsdp2_tensor4", "tensor8"], ODD, cut=["tensor8"]
        ),
        "kernel": case_kernel,
        "context": lambda: case_context(["fsdp2_context2_tensor2"]),
        "longer_rings": lambda: case_context(["context4_tensor2", "context8"]),
        "exchanged": case_exchanged,
        "exchanged_context": lambda: case_gradients(
            ["expert4_context2"],
            EXPERTS | CONTEXT | {"layer_pattern": ("local",)},
            load_balance_loss=0.1,
        ),
        "experts_muon": lambda: case_losses(["fsdp8"], "muon", EXPERTS),
        "adafactor": lambda: case_losses(["2x2x2"], "adafactor"),
        "accumulation": lambda: case_losses(
            *(["fsdp2_tensor4"], "adamw", ODD | {"sequence_parallel": True}),
            **{"accumulation_steps": 2, "accumulate_whole": True, "loss_chunk": 64},
        ),
        "skips": lambda: case_skips(folder),
        "adamw": lambda: {
            **case_losses(["fsdp8"], "adamw", ODD),
            "resumed": case_resume(
                folder, "2x2x2", ["one", "data8", "tensor8", "fsdp8"]
            ),
        },
        "muon": lambda: case_resume(folder, "fsdp2_tensor4", ["2x2x2"], "muon"),
        "edits": lambda: case_edits(["fsdp2_tensor4"]),
        "edits_experts": lambda: case_edits(["2x2x2"], EXPERTS, differentiate=False),
        "inside": lambda: case_inside(["fsdp2_tensor4"]),
        "generate": lambda: case_generate(["data8", "fsdp8", "2x2x2", "tensor8"]),
    }
    print(json.dumps(cases[case]()))
