"""Tables and figures of a report, as HTML: every cell that is not Markup is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

# A path from the root, at least two folders deep; the last part is kept.
_PLACE = re.compile(r"(?<![\w.:/…])/(?:[^\s/:'\"<>,]+/)+([^\s/:'\"<>,]*)")


def without_places(text: str) -> str:
    """Text without the folders of the machine that it was made on: reports are passed on."""
    return _PLACE.sub(r"…/\1", text)


def number(value: Any, name: str = "") -> str:
    if value is None:
        return "–"
    if name.endswith("/objects"):
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else without_places(str(value))
    )


def change(
    before: float | None,
    after: float | None,
    between: Sequence[float] | None = None,
    *,
    worse_is_more: bool = False,
) -> Markup:
    """between: where the change lies in drawn sets; one that may be 0 gets no colour."""
    if before is None or after is None:
        return Markup("–")
    difference = after - before
    good = difference < 0 if worse_is_more else difference > 0
    small = abs(difference) < 5e-4 or (between is not None and between[0] <= 0 <= between[1])
    shade = "" if small else ' class="good"' if good else ' class="bad"'
    return Markup(f"<span{shade}>{difference:+.3f}</span>")


def between(limits: Sequence[float] | None, *, signed: bool = False) -> Markup:
    if limits is None:
        return Markup("")
    low, high = (f"{v:+.3f}" if signed else f"{v:.3f}" for v in limits)
    return Markup(f' <small class="range">{low} to {high}</small>')


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Every cell that is not Markup is escaped."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    return f'<p class="note">{escape(without_places(text))}</p>' if text else ""
