"""A tokenizer.json whose special tokens are not matched in text: text stays text."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.tokenizers.hugging_face.tokenizer_json import AddedToken


def literal(
    data: Mapping[str, Any],
    vocab: Mapping[str, int],
    added: Sequence[AddedToken],
    hidden: Mapping[str, int],
    *,
    later: bool,
) -> dict[str, Any]:
    """Changes a tokenizer.json: the same ids, but no `hidden` token is matched in text.

    The hidden tokens stay in the vocabulary, under names that no text can become: a BPE
    reaches a name only by merges, and those that lead to one are removed; other models
    split text at spaces, or replace them, before they look a word up.

    Padding, truncation, dropout and tokens added around a text are turned off.

    Args:
      data: the file.
      vocab: its `vocabulary`.
      added: its `added_tokens`.
      hidden: text -> id of the tokens that must stay text.
      later: whether the text follows a special token; then nothing that is only for the
        first word of a text is added.
    """
    model = {**data["model"]}
    names = {text: _unused_name(text, vocab) for text in hidden}
    kept = [t for t in added if t.content not in hidden]
    if isinstance(model["vocab"], list):
        model["vocab"] = _literal_list(model["vocab"], hidden, names, kept)
    else:
        model["vocab"] = {names.get(text, text): i for text, i in vocab.items()}
        model["vocab"] |= {names[text]: i for text, i in hidden.items()}
        model["vocab"] |= {t.content: t.id for t in kept}
    if "merges" in model:
        model["merges"] = _literal_merges(model["merges"], hidden.keys() & vocab.keys())
    if "dropout" in model:
        model["dropout"] = None
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    out = {**data, "model": model, "padding": None, "truncation": None}
    out["post_processor"] = None
    entries = data.get("added_tokens") or []
    out["added_tokens"] = [e for e in entries if e["content"] not in hidden]
    if later:
        out["pre_tokenizer"] = _without_first_prefix(data.get("pre_tokenizer"))
    return out


def _unused_name(text: str, vocab: Mapping[str, int]) -> str:
    name = f" {text}"
    while name in vocab:
        name = f" {name}"
    return name


def _literal_list(
    vocab: list[Any],
    hidden: Mapping[str, int],
    names: Mapping[str, str],
    kept: list[AddedToken],
) -> list[Any]:
    """Renames in a Unigram vocabulary, whose ids are indices."""
    renamed = [[names.get(piece, piece), score] for piece, score in vocab]
    others = {i: names[text] for text, i in hidden.items()}
    others |= {t.id: t.content for t in kept}
    while len(renamed) in others:
        renamed.append([others[len(renamed)], 0.0])
    return renamed


def _literal_merges(merges: list[Any], hidden: set[str]) -> list[Any]:
    if not hidden:
        return merges
    kept = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not hidden & {*pair, "".join(pair)}:
            kept.append(merge)
    return kept


def _without_first_prefix(step: Any) -> Any:
    """Removes the space that a pre-tokenizer adds to the first word of a text only."""
    if isinstance(step, list):
        return [_without_first_prefix(s) for s in step]
    if not isinstance(step, dict):
        return step
    step = {k: _without_first_prefix(v) for k, v in step.items()}
    if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
        step["prepend_scheme"] = "never"
    return step
