"""Charts of reports: SVG that scales with the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

from sam3jax.viewing.draw import colour

_DECADES = 6  # that an axis of powers of ten shows at most


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    logarithmic: bool = False,
    x: str = "step",
    shares: bool = False,
) -> str:
    """An inline SVG of lines of points (x, value) that scales with the page and inherits its text colour.

    shares: both axes run from 0 to 1.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": f"chart {title}"}):
        # Fixed margins: measuring every label to set them takes as long as drawing the chart.
        figure = Figure(figsize=(4.6, 2.9))
        axes = figure.subplots(gridspec_kw=dict(left=0.15, right=0.98, bottom=0.15, top=0.86))
        for k, (name, points) in enumerate(series.items()):
            steps, values = zip(*points) if points else ((), ())
            mark = "o" if len(points) < 25 else None
            shade = tuple(c / 255 * 0.85 for c in colour(k))
            axes.plot(
                steps, values, label=name, color=shade, linewidth=1.4, marker=mark, markersize=3
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x)
        if shares:
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        positive = [v for points in series.values() for _, v in points if v > 0]
        if logarithmic and positive:
            axes.set_yscale("log")
            # A part that is all but nothing would press the others together.
            axes.set_ylim(bottom=max(min(positive) / 2, max(positive) / 10**_DECADES))
            plain = lambda value, _: f"{value:g}"
            axes.yaxis.set_major_formatter(plain)
            few = max(positive) < 10 * min(positive)
            axes.yaxis.set_minor_formatter(plain if few else lambda *_: "")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(fontsize=7.5, frameon=False, ncols=2 if len(series) > 4 else 1)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    )
    # Black becomes the page's ink, so that the chart can be read on a dark page too.
    svg = svg.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    return svg[svg.index("<svg") :]
