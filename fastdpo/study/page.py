"""HTML pages of one file: nothing is fetched, everything from data and models is escaped, no JavaScript is needed."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from .blocks import Block

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; background: #fff; color: #1a1a1a;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin-top: 2.4rem; } h3 { font-size: 1.08rem; }
p, li { max-width: 46rem; } a { color: #00527e; }
figure { margin: 1.4rem 0; } img { max-width: 100%; height: auto; }
figcaption, caption { color: #444; font-size: .92rem; text-align: left; max-width: 46rem; }
caption { padding-bottom: .4rem; }
.wide { overflow-x: auto; margin: 1.4rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 16rem; text-align: left; }
th { border-bottom: 2px solid #666; vertical-align: bottom; } .label { text-align: left; }
tbody tr:hover { background: #f4f6f8; } summary { cursor: pointer; color: #00527e; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .wide { overflow: visible; } table { font-size: 8.5pt; } img { max-height: 165mm; }
  details::details-content { content-visibility: visible; } details > * { display: block; }
}
"""

_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)

# What may load: this style and images inside the page; nothing may run
_DOCUMENT = _ENVIRONMENT.from_string(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src {{ style_hash }}; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="fastdpo study">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{{ body }}
</body>
</html>
"""
)

_BLOCKS = _ENVIRONMENT.from_string(
    """\
{% for kind, block in found %}
{% if kind == "Heading" %}
<h{{ block.level }}>{{ block.text }}</h{{ block.level }}>
{% elif kind == "Paragraph" %}
<p>{% if block.lead %}<strong>{{ block.lead }}</strong> {% endif %}{{ together(block.text) }}</p>
{% elif kind == "Bullets" %}
<ul>
{% for item in block["items"] %}
<li>{{ item }}</li>
{% endfor %}
</ul>
{% elif kind == "Table" %}
<div class="wide"><table>
<caption>{{ block.caption }}</caption>
<thead><tr>{% for cell in block.header %}<th scope="col"\
{% if loop.index <= block.labels %} class="label"{% endif %}>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>{% for cell in row %}<td\
{% if cell|length > 60 %} class="long"\
{% elif loop.index <= block.labels %} class="label"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% elif kind == "Picture" %}
<figure>
<img src="{{ data_uri(block.path) }}" alt="{{ block.alt }}">
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% elif kind == "Fold" %}
<details><summary>{{ block.title }}</summary>
{{ render(block.blocks) }}
</details>
{% endif %}
{% endfor %}
"""
)


def document(title: str, found: Sequence[Block]) -> str:
    """A whole page of blocks. By its Content-Security-Policy no script, event handler or style attribute has effect."""
    return _DOCUMENT.render(
        title=title, body=render(found), style=Markup(STYLE), style_hash=Markup(f"'{source_hash(STYLE)}'")
    )


def source_hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def render(found: Sequence[Block]) -> Markup:
    """Blocks as HTML, escaped; pictures are embedded."""
    named = [(type(block).__name__, block) for block in found]
    return Markup(_BLOCKS.render(found=named, together=_together, data_uri=_data_uri, render=render))


def _together(text: str) -> str:
    """No line ends within β = 0.1, 0.5 ± 0.1 and their like."""
    return re.sub(r" ([=<±]) ", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text)


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
