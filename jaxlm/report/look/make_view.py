"""Computes a `View`: one forward pass with taps, and analyses of what they read.

The analyses are those of `jaxlm.interp` and `jaxlm.infer.sampling_steps`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Integer

from jaxlm import tree
from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.fields import to_dict
from jaxlm.infer.sampling_steps import sampling_steps
from jaxlm.interp.cache_contents import bytes_per_token, visible_tokens
from jaxlm.interp.token_table import token_table
from jaxlm.model.block import layer_kinds
from jaxlm.report.look import readings
from jaxlm.report.look.cause_view import causes
from jaxlm.report.look.model_map import stages
from jaxlm.report.look.view import (
    AdditionView,
    AnswerView,
    CacheView,
    ChoiceView,
    ExpertView,
    HeadView,
    StreamView,
    TextView,
    UnitView,
    View,
)
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params, Trace

Numbers = dict[str, np.ndarray]

MAX_TOKENS = 128
"""Tokens of a view."""
_UNIT_POSITIONS = 24
# Bytes before compression; with the rest a page stays below 5 MB.
_HEAD_BYTES = 2_000_000
_LOGIT_BYTES = 800_000


def view_of(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    tokens: Integer[np.ndarray, " T"] | Sequence[int],
    *,
    against: Integer[np.ndarray, " T"] | Sequence[int] | None = None,
    num_prompt: int | None = None,
    sample: SampleConfig | None = None,
    jacobian: Float[np.ndarray, "L D D"] | None = None,
    title: str = "",
    call: str = "",
) -> View:
    """Looks at a model while it reads a text.

    Args:
      tokens: the text; of what was generated, as much as makes 128 tokens.
      against: another text of as many tokens, whose streams are put into this one.
      num_prompt: how many of the tokens are the prompt, if others were generated.
      sample: how the next token is chosen; None: by the model's distribution.
      jacobian: a Jacobian lens of the model, which is shown beside the logit lens.
      title: a name of the model.
      call: what the reader can run to get the same.

    Raises:
      ValueError: for a prompt without tokens or of more than 128, or texts of different
        lengths.
    """
    given, theirs = _checked_texts(tokens, against, num_prompt)
    length, left_out = shortened(given)
    ids, num_prompt = given[:length], min(num_prompt or length, length)
    position = num_prompt - 1
    params = jax.tree.map(jnp.asarray, params)
    text, other = readings.reading(config, position, params, ids), None
    if theirs is not None:
        theirs = theirs[:length]
        other = readings.reading(config, position, params, theirs)
    trace, found = text.trace, text.found
    answer = AnswerView(
        *(found[name] for name in ("ids", "probabilities", "logits", "entropy"))
    )
    best, moved = answer.ids[:, 0], None
    streams = _streams(config, params, trace, best)
    if jacobian is not None:
        moved = _streams(config, params, trace, best, jacobian)
    units, units_refusal = _units(config, params, trace, best, position)
    cause, comparison = causes(config, params, text, position, other)
    choice = _choice(text.logits, sample, position, ids)
    heads = _heads(config, trace, found, left_out)
    if len(choice.positions) < len(ids):
        left_out.append(
            f"the logits of {len(ids) - len(choice.positions)} of {len(ids)} tokens, "
            f"but for their {answer.ids.shape[1]} likeliest next tokens"
        )
    shown = [ids, answer.ids, streams.ids, choice_ids(choice), np.array(cause.tokens)]
    shown += [moved.ids] if moved else []
    shown += [units.promotes] if units else []
    shown += [comparison.ids] if comparison else []
    return View(
        title=title,
        call=call,
        model={**to_dict(config), "parameters": tree.count(params)},
        stages=stages(config, len(ids)),
        left_out=left_out,
        position=position,
        pieces=_pieces(tokenizer, shown),
        text=_text(tokenizer, ids, num_prompt, found),
        answer=answer,
        choice=choice,
        streams=streams,
        jacobian=moved,
        cache=_cache(config, found, len(ids)),
        heads=heads,
        units=units,
        units_refusal=units_refusal,
        experts=_experts(trace),
        additions=_additions(trace, found),
        causes=cause,
        comparison=comparison,
        against=[] if theirs is None else [_piece(tokenizer, int(i)) for i in theirs],
    )


def _checked_texts(
    tokens: Integer[np.ndarray, " T"] | Sequence[int],
    against: Integer[np.ndarray, " T"] | Sequence[int] | None,
    num_prompt: int | None,
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"] | None]:
    """Returns the two texts as arrays; raises ValueError as `view_of` says."""
    given = np.asarray(tokens, np.int32)
    theirs = None if against is None else np.asarray(against, np.int32)
    if not len(given):
        raise ValueError("there is no token to look at: give a prompt")
    if theirs is not None and len(theirs) != len(given):
        raise ValueError(
            f"the two texts have {len(given)} and {len(theirs)} tokens: patching "
            "needs as many in both"
        )
    if (num_prompt or len(given)) > MAX_TOKENS:
        raise ValueError(
            f"the prompt has {num_prompt or len(given)} tokens, and a view shows at "
            f"most {MAX_TOKENS}: shorten it"
        )
    return given, theirs


def shortened(ids: Int[np.ndarray, " T"]) -> tuple[int, list[str]]:
    """Returns how many tokens a view shows, and what it leaves out."""
    more = len(ids) - MAX_TOKENS
    if more <= 0:
        return len(ids), []
    return MAX_TOKENS, [f"the last {more} of {len(ids)} tokens"]


def _streams(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    answers: Int[np.ndarray, " T"],
    jacobian: Float[np.ndarray, "L D D"] | None = None,
) -> StreamView:
    lens = None if jacobian is None else jnp.asarray(jacobian)
    numbers = readings.lens(config, params, trace, answers, lens)
    return StreamView(*map(np.asarray, numbers))


def _pieces(tokenizer: Tokenizer, shown: Sequence[np.ndarray]) -> dict[int, str]:
    """Returns the text of each id that the view shows."""
    ids = np.unique(np.concatenate([array.ravel() for array in shown]))
    return {i: _piece(tokenizer, i) for i in ids.tolist()}


def _piece(tokenizer: Tokenizer, token_id: int) -> str:
    names = {i: text for text, i in tokenizer.special_ids.items()}
    if token_id in names:
        return names[token_id]
    if token_id >= len(tokenizer.token_bytes):
        return f"<{token_id}>"  # an id that pads the vocabulary
    return tokenizer.token_bytes[token_id].decode("utf-8", "replace")


def _text(
    tokenizer: Tokenizer, ids: Int[np.ndarray, " T"], num_prompt: int, found: Numbers
) -> TextView:
    rows = []
    for row in token_table(tokenizer, ids):
        rows.append({**row._asdict(), "data": row.data.hex(" ")})
    return TextView(
        rows,
        num_prompt,
        np.concatenate([[np.nan], found["surprise"]]).astype(np.float32),
        np.concatenate([[-1], found["rank"]]).astype(np.int32),
    )


def _choice(
    logits: Float[np.ndarray, "T V"],
    sample: SampleConfig | None,
    position: int,
    ids: Int[np.ndarray, " T"],
) -> ChoiceView:
    steps = []
    if sample is not None:
        prompt = ids[: position + 1].tolist()
        steps = sampling_steps(logits[position], sample, prompt=prompt)
    whole = max(1, _LOGIT_BYTES // (4 * logits.shape[-1]))
    positions = np.arange(position, min(position + whole, len(ids)), dtype=np.int32)
    names = ("temperature", "top_k", "top_p", "min_p")
    return ChoiceView(
        positions,
        logits[positions],
        {name: getattr(sample or SampleConfig(), name) for name in names},
        [
            {"rule": s.rule, "removed": s.removed, "kept": int(s.kept.sum())}
            for s in steps
        ],
    )


def choice_ids(choice: ChoiceView, count: int = 200) -> Int[np.ndarray, " n"]:
    """Returns the ids that the page may have to name for these positions."""
    count = min(count, choice.logits.shape[-1])
    return np.unique(np.argpartition(-choice.logits, count - 1, axis=-1)[:, :count])


def _cache(config: ModelConfig, found: Numbers, T: int) -> CacheView:
    return CacheView(
        np.asarray(found["key_lengths"], np.float16),
        np.asarray(found["cached_value_lengths"], np.float16),
        visible_tokens(config, T).astype(np.int32),
        found["read"],
        bytes_per_token(config),
    )


def _heads(
    config: ModelConfig, trace: Trace, found: Numbers, left_out: list[str]
) -> HeadView:
    """Keeps as many heads as fit, first those that bring most from other tokens."""
    query = "q" if config.qk_norm == "none" else "q_normed"
    taps = {site: trace[site] for site in ("attn_probs", "attn_lse", query, "q_rot")}
    host = {site: x[:, 0] for site, x in jax.device_get(taps).items()}
    probs, lengths, T = host["attn_probs"], found["value_lengths"], len(found["ids"])
    moved = np.einsum("LNTS,LNS->LN", probs, lengths)
    moved -= np.einsum("LNTT,LNT->LN", probs, lengths)
    size = 2 * (T * (T + 1) // 2 + 2 * config.head_dim) + 8 * T
    count = min(moved.size, max(config.num_heads, _HEAD_BYTES // size))
    if count < moved.size:
        left_out.append(
            f"attention of {moved.size - count} of {moved.size} heads, those that "
            "bring least from other tokens"
        )
    chosen = np.sort(np.argsort(-moved, axis=None, kind="stable")[:count])
    layer, head = np.divmod(chosen, config.num_heads)
    kinds = layer_kinds(config)
    local = [kinds[i % len(kinds)].local for i in range(config.num_layers)]
    return HeadView(
        np.stack([layer, head], axis=1).astype(np.int32),
        np.asarray(probs[layer, head][:, *np.tril_indices(T)], np.float16),
        host["attn_lse"][layer, head],
        lengths[layer, head],
        np.asarray(host[query][layer, 0, head], np.float16),
        np.asarray(host["q_rot"][layer, 0, head], np.float16),
        found["kinds"][layer, head],
        [config.window if is_local else None for is_local in local],
        config.rotary_dim if config.position == "rope" else 0,
    )


def _units(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    answers: Int[np.ndarray, " T"],
    position: int,
) -> tuple[UnitView | None, str | None]:
    T = len(answers)
    first = max(0, min(position - _UNIT_POSITIONS // 2, T - _UNIT_POSITIONS))
    positions = np.arange(first, min(first + _UNIT_POSITIONS, T), dtype=np.int32)
    needed = ("mlp_act", "final_norm_div")
    read = {site: trace[site] for site in needed if site in trace}
    try:
        numbers = readings.unit_numbers(config, params, read, answers, positions)
    except ValueError as error:  # The reader is told why.
        return None, str(error)
    layers, units, parts, totals, activations, promotes = map(np.asarray, numbers)
    activations = activations.astype(np.float16)
    view = UnitView(positions, layers, units, parts, totals, activations, promotes)
    return view, None


def _experts(trace: Trace) -> ExpertView | None:
    if "expert_ids" not in trace:
        return None
    ids, weights = (np.asarray(trace[f"expert_{x}"])[:, 0] for x in ("ids", "weights"))
    return ExpertView(ids.astype(np.int32), weights.astype(np.float32))


def _additions(trace: Trace, found: Numbers) -> AdditionView:
    def of_site(site: str) -> np.ndarray | None:
        if site not in trace:
            return None
        return np.asarray(trace[site])[:, 0].reshape(found["attention"].shape)

    return AdditionView(
        found["attention"],
        found["feed_forward"],
        found["attention_alignment"],
        found["feed_forward_alignment"],
        of_site("attn_norm_div"),
        of_site("mlp_norm_div"),
        np.asarray(trace["attn_in"])[:, 0],
        np.asarray(trace["mlp_in"])[:, 0],
    )
