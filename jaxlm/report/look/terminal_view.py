"""What `jaxlm look --terminal` prints: the view in short."""

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxlm.report.look.view import View


def print_view(view: View, console: Console | None = None) -> None:
    """Prints tokens, answer, streams, attention, memory and causes.

    Args:
      console: where; None: stdout.
    """
    console = console or Console()
    console.print(Text(view.title, style="bold"))
    _tokens(view, console)
    _answer(view, console)
    _streams(view, console)
    _heads(view, console)
    _units(view, console)
    _causes(view, console)
    for words in view.left_out:
        console.print(Text(f"Left out: {words}.", style="dim"))


def _shown(view: View, token_id: int | np.integer) -> str:
    text = view.pieces.get(int(token_id), f"<{token_id}>")
    return text.replace(" ", "␣").replace("\n", "⏎") or "(nothing)"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 else "right")
    return table


def _bar(share: float, width: int = 16) -> Text:
    style = "blue" if share >= 0 else "dark_orange"
    return Text("█" * round(min(1.0, abs(share)) * width), style=style)


def _tokens(view: View, console: Console) -> None:
    line = Text("Tokens: ")
    for i, row in enumerate(view.text.rows):
        style = "bold reverse" if i == view.position else "on grey23" if i % 2 else ""
        line.append(_shown(view, row["id"]), style=style)
    console.print(line)


def _answer(view: View, console: Console) -> None:
    answer, t = view.answer, view.position
    table = _table("The answer", "next token", "probability", "logit", "")
    table.columns[-1].justify = "left"
    for k in range(min(8, answer.ids.shape[1])):
        p = float(answer.probabilities[t, k])
        name = Text(_shown(view, answer.ids[t, k]))
        table.add_row(name, f"{p:.2%}", f"{answer.logits[t, k]:.2f}", _bar(p))
    console.print(table)
    console.print(f"Entropy {answer.entropy[t]:.2f} nats.")


def _streams(view: View, console: Console) -> None:
    streams, t = view.streams, view.position
    table = _table(
        "Streams side by side (logit lens)",
        *("layers read", "would answer", "probability", "rank of answer", "length"),
    )
    for m in range(len(streams.ids)):
        p = float(streams.probabilities[m, t, 0])
        table.add_row(
            f"after {m - 1}" if m else "embedding",
            Text(_shown(view, streams.ids[m, t, 0])),
            f"{p:.1%}",
            str(streams.answer_rank[m, t]),
            f"{streams.lengths[m, t]:.1f}",
        )
    console.print(table)


def _heads(view: View, console: Console) -> None:
    """Prints the keys that bring most, of all heads."""
    heads, t = view.heads, view.position
    row = slice(t * (t + 1) // 2, (t + 1) * (t + 2) // 2)
    probs = heads.probabilities[:, row].astype(float)
    brings = probs * heads.value_lengths[:, : t + 1]
    table = _table(
        "Attention: what brings most to the last token",
        *("layer, head", "reads", "probability", "brings", ""),
    )
    table.columns[-1].justify = "left"
    order = brings.argsort(axis=None)[::-1][:8]
    for i, s in zip(*divmod(order, t + 1), strict=True):
        table.add_row(
            "{}, {}".format(*heads.heads[i]),
            Text(f"{s} {_shown(view, view.text.rows[s]['id'])}"),
            f"{probs[i, s]:.1%}",
            f"{brings[i, s]:.2f}",
            _bar(brings[i, s] / max(brings.max(), 1e-30)),
        )
    console.print(table)


def _units(view: View, console: Console) -> None:
    units = view.units
    if units is None:
        return
    p = units.positions.tolist().index(view.position)
    answer = _shown(view, view.answer.ids[view.position, 0])
    table = _table(
        "Feed-forward as memory", "layer, unit", f"adds to {answer}", "raises"
    )
    table.columns[-1].justify = "left"
    for u in range(min(6, units.units.shape[1])):
        raised = " ".join(_shown(view, i) for i in units.promotes[p, u])
        table.add_row(
            f"{units.layers[p, u]}, {units.units[p, u]}",
            f"{units.parts[p, u]:.2f}",
            Text(raised, overflow="ellipsis", no_wrap=True),
        )
    console.print(table)


def _causes(view: View, console: Console) -> None:
    cause = view.causes
    ours, theirs = (_shown(view, i) for i in cause.tokens)
    if cause.parts is None:
        console.print(Text(f"Who wrote it: {cause.refusal}."))
        return
    title = f"Who wrote {ours} over {theirs}: {cause.difference:.2f} logits"
    table = _table(title, "part", "adds", "")
    table.columns[-1].justify = "left"
    names = ("attention", "feed-forward")
    order = abs(cause.parts).argsort(axis=None)[::-1][:8]
    largest = float(abs(cause.parts).max()) or 1.0
    for layer, kind in zip(*divmod(order, 2), strict=True):
        part = float(cause.parts[layer, kind])
        table.add_row(f"{names[kind]} {layer}", f"{part:+.2f}", _bar(part / largest))
    console.print(table)
