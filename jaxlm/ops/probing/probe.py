"""`Probe`: what the model calls at each of its named sites.

The model calls `probe(site, x)` and continues with the result. When nothing is tapped
or edited that is `x` itself, so the compiled program is the same as without the call.
The sites are in `sites.py`, what may be read and changed in `tap.py` and `edit.py`.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Int

from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap


class Probe:
    """Edits and collects named values of one part of the model while it is traced.

    Args:
      positions: of the tokens in their text; only edits need them.
      layer: the number of the layer, which may be traced; None outside the layers.
    """

    def __init__(
        self,
        taps: Sequence[Tap] = (),
        edits: Sequence[Edit] = (),
        positions: Int[Array, "B T"] | None = None,
        layer: Any = None,
    ):
        self.taps, self.edits = taps, edits
        self._taps = {tap.site: tap for tap in taps}
        self._positions, self._layer = positions, layer
        self.values: dict[str, Any] = {}
        """What the taps keep."""
        self.hits: list[Any] = [0] * len(edits)
        """How often each edit has fired."""
        self.called: set[str] = set()
        self._read: dict[str, Array] = {}

    def __contains__(self, site: str) -> bool:
        return site in self._taps

    def is_edited(self, *sites: str) -> bool:
        """Whether one of these sites is edited."""
        return any(edit.site in sites for edit in self.edits)

    def __call__(self, site: str, x: Array) -> Array:
        assert site in SITES, site
        if site in self.called and self.is_edited(site):
            raise ValueError(
                f"edit of {site!r}: the block calls probe({site!r}, x) twice, so it "
                "would be edited twice: call it once"
            )
        self.called.add(site)
        for i, edit in enumerate(self.edits):
            if edit.site == site:
                assert self._positions is not None
                read = x if edit.reads is None else self._value_of(edit)
                x, self.hits[i] = edit(x, self._layer, self._positions, read)
        if any(edit.reads == site for edit in self.edits):
            self._read[site] = x
        if site in self._taps:
            tap = self._taps[site]
            self.values[site] = tap.reduced(tap.take(x))
        return x

    def _value_of(self, edit: Edit) -> Array:
        """Returns the value of the site that an edit of another one reads."""
        if edit.reads not in self._read:
            raise ValueError(
                f"edit of {edit.site!r}: {edit.reads!r} is not computed before it"
            )
        return self._read[edit.reads]
