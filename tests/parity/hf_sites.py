"""The sites of a model of transformers, read where its own code has them."""

import sys
from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch
from hf_case import blocks
from parity_case import tokens

from jaxlm.config import ModelConfig
from jaxlm.model.recording import letter_sizes
from jaxlm.ops.probing.sites import SITES

ATTENTION = ("self_attn", "attn", "attention")
OUTPUT = ("o_proj", "c_proj", "dense")
FEED_FORWARD = ("mlp", "block_sparse_moe")
ATTENTION_NORM = ("input_layernorm", "ln_1")
FEED_FORWARD_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm")


def part(block, *names):
    """The first submodule that has one of these names."""
    return next(getattr(block, name) for name in names if hasattr(block, name))


class Sites:
    """Values by site, those of the layers in a list."""

    def __init__(self, c: ModelConfig):
        self.config = c
        length = tokens(c).shape[1]
        self.sizes = letter_sizes(c, 1, length, length)
        self.found: dict[str, list[np.ndarray]] = {}

    def put(self, site, value):
        shape = [self.sizes[letter] for letter in SITES[site].shape.split()]
        value = value.detach().reshape(shape).numpy()
        self.found.setdefault(site, []).append(value)

    def reads(self, module, site, change=lambda x: x):
        """The input of a module, or what `change` makes of it."""

        def hook(_module, args, named):
            self.put(site, change(args[0] if args else named["hidden_states"]))

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def gives(self, module, *sites):
        """The outputs of a module, or equal parts of its only one."""

        def hook(_module, _inputs, output):
            if not isinstance(output, tuple):
                output = output.chunk(len(sites), dim=-1)
            for site, value in zip(sites, output, strict=False):
                self.put(site, value)

        module.register_forward_hook(hook)

    def divides(self, norm, site):
        """The divisor of a norm, by its definition, in float64."""

        def divisor(x):
            x = x.double()
            if self.config.norm == "layer":
                x = x - x.mean(-1, keepdim=True)
            square = x.square().mean(-1, keepdim=True)
            return (square + self.config.norm_epsilon).sqrt()

        self.reads(norm, site, divisor)

    def hook_block(self, block):
        c = self.config
        attention, mlp = part(block, *ATTENTION), part(block, *FEED_FORWARD)
        self.reads(block, "resid_pre")
        self.reads(attention, "attn_in")
        self.reads(part(attention, *OUTPUT), "z")
        self.gives(attention, "attn_out")
        self.reads(mlp, "mlp_in")
        self.gives(mlp, "mlp_out")
        self.gives(block, "resid_post")
        if c.qk_norm != "none":
            self.gives(attention.q_proj, "q")
            self.gives(attention.k_proj, "k")

        added = (attention, mlp)
        if c.norm_placement in ("both", "output"):
            added = (block.post_attention_layernorm, block.post_feedforward_layernorm)
        self.gives(added[0], "attn_out_post")
        self.gives(added[1], "mlp_out_post")
        reads_middle = mlp
        if c.norm_placement != "output":
            reads_middle = part(block, *FEED_FORWARD_NORM)
            self.divides(part(block, *ATTENTION_NORM), "attn_norm_div")
            self.divides(reads_middle, "mlp_norm_div")
        if not c.parallel_block:
            self.reads(reads_middle, "resid_mid")

        if c.num_experts:
            router = part(mlp, "gate", "router")
            self.gives(router, "router_logits", "expert_weights", "expert_ids")
            return
        self.reads(part(mlp, "down_proj", "c_proj", "dense_4h_to_h"), "mlp_act")
        if hasattr(mlp, "gate_up_proj"):
            self.gives(mlp.gate_up_proj, "mlp_pre", "mlp_up")
        elif c.gated:
            self.gives(mlp.gate_proj, "mlp_pre")
            self.gives(mlp.up_proj, "mlp_up")
        else:
            self.gives(part(mlp, "c_fc", "dense_h_to_4h"), "mlp_pre")

    def hook_outside(self, model):
        embedding, base = model.get_input_embeddings(), model.base_model
        self.reads(embedding, "tokens")
        self.gives(embedding, "embed")
        if self.config.position == "learned":
            self.gives(base.wpe, "pos_embed")
        self.divides(part(base, *FINAL_NORM), "final_norm_div")
        self.reads(model.get_output_embeddings(), "final_norm")

    def put_attention(self, rotations, attentions, softmaxes, sinks):
        """What the family's own functions were called with, in order of the layers."""
        normed = "" if self.config.qk_norm == "none" else "_normed"
        before = (f"q{normed}", f"k{normed}")
        inputs = [call.args[1:4] for call in attentions]
        unrotated = [call.args[:2] for call in rotations] or [x[:2] for x in inputs]
        for sites, layers in ((before, unrotated), (("q_rot", "k_rot", "v"), inputs)):
            for values in layers:
                for site, value in zip(sites, values, strict=True):
                    self.put(site, value.transpose(1, 2))
        scores = [call.args[0] for call in softmaxes if call.args[0].ndim == 4]
        for x, sink in zip(scores, sinks, strict=True):
            lse = x.double().logsumexp(-1)
            if sink is not None:  # the last column, after the maximum was subtracted
                maximum = sink[None, :, None] - x[..., -1]
                x, lse = x[..., :-1] + maximum[..., None], lse + maximum
            self.put("attn_scores", x)
            self.put("attn_lse", lse)

    def put_heads(self, outputs):
        """What each head adds: its part of the input times its part of the matrix."""
        for output, z in zip(outputs, self.found["z"], strict=True):
            matrix = output.weight.detach().numpy()
            # A Conv1D, of GPT-2, has the inputs first.
            matrix = matrix if self.config.position == "learned" else matrix.T
            matrix = matrix.reshape(*z.shape[2:], -1)
            self.put("head_out", torch.tensor(np.einsum("BTNH,NHD->BTND", z, matrix)))


def read_sites(model, c: ModelConfig) -> dict[str, np.ndarray]:
    """Runs the model, which keeps the hooks; returns values as in a trace of ours.

    Scores are the argument of transformers' softmax, and q, k and v those of its
    rotation and its attention.
    """
    sites = Sites(c)
    sites.hook_outside(model)
    for block in blocks(model):
        sites.hook_block(block)
    attentions = [part(block, *ATTENTION) for block in blocks(model)]
    family = sys.modules[type(attentions[0]).__module__]
    spied = [
        (family, "apply_rotary_pos_emb"),
        (family, "eager_attention_forward"),
        (torch.nn.functional, "softmax"),
    ]
    with ExitStack() as stack, torch.no_grad():
        calls = [
            stack.enter_context(
                mock.patch.object(owner, name, wraps=getattr(owner, name))
            ).call_args_list
            if hasattr(owner, name)
            else []
            for owner, name in spied
        ]
        ids = torch.tensor(tokens(c)).long()
        out = model(ids, use_cache=False, output_attentions=True)
    sites.put_attention(*calls, [getattr(x, "sinks", None) for x in attentions])
    for probs in out.attentions:
        sites.put("attn_probs", probs)
    sites.put_heads([part(x, *OUTPUT) for x in attentions])
    sites.put("logits", out.logits)
    return {
        site: x[0] if SITES[site].outside_layers else np.stack(x)
        for site, x in sites.found.items()
    }
