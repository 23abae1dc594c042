"""The frame of report.html: style for narrow and wide windows, light and dark."""

from jinja2 import Environment

# The page may show inlined pictures and its own style, and run or load nothing, whatever stands in the data.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} – sam3jax</title>
<style>
:root { --ink: #1c1e21; --soft: #666c75; --line: #dcdfe4; --page: #fff; --card: #f5f6f8;
  --good: #0a7d33; --bad: #c0271b; --link: #1257b8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa1ab; --line: #3a3f47;
  --page: #16181b; --card: #212429; --good: #58c878; --bad: #ff8073; --link: #8ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
h4 { font-size: .85rem; font-weight: 500; margin: .2rem 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin: .5rem 0; }
a { color: var(--link); }
.note, small, figcaption, summary { color: var(--soft); font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin-bottom: 14px; }
.tiles div { background: var(--card); border-radius: 8px; padding: 10px 12px; }
.tiles span { display: block; font-size: .8rem; color: var(--soft); }
.tiles b { font-size: 1.5rem; margin-right: .4rem; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; /* a shadow on the side where there is more to see */
  background: linear-gradient(to left, var(--page) 30%, transparent) right / 48px 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
th { color: var(--soft); font-weight: 500; }
td:has(.words) { text-align: left; } .words { display: inline-block; white-space: normal; min-width: 16rem; color: var(--soft); }
small.range { white-space: nowrap; font-size: .78rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 12px; }
figure { margin: 0; }
.chart svg { width: 100%; height: auto; display: block; }
.chart svg text { font-family: inherit !important; }
.picture { margin-bottom: 16px; }
.parts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); gap: 8px; max-width: 1180px; }
.parts img { width: 100%; height: auto; display: block; border-radius: 4px; }
.wide img, .wide video { max-width: 100%; height: auto; display: block; border-radius: 4px; margin: 12px 0; }
.wide figure { overflow-x: auto; }
.panels img { min-width: 56rem; } /* a row of pictures: scrolled rather than shrunk */
pre { overflow-x: auto; background: var(--card); padding: 10px; border-radius: 8px; font-size: .8rem; }
@media print { details { display: block; } nav { display: none; } }
</style></head>
<body>
<header><h1>{{ title }}</h1><p class="note">{{ data }}{{ step }}</p><nav>{{ links }}</nav></header>
{{ body }}
</body></html>
"""

# Escapes whatever is not marked as HTML.
_TEMPLATE = Environment(autoescape=True).from_string(_PAGE)


def page(**parts: str) -> str:
    """The page; parts: title, data, step and, as Markup, links and body."""
    return _TEMPLATE.render(policy=_POLICY, **parts)
