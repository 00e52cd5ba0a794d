"""The frame of a page that stands alone: its style, its contents, and the pieces that its sections are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from wdat.records import Record
from wdat.reporting import figures, plots

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser runs and fetches nothing here
STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--soft:#5d646d;--page:#fbfbfa;--card:#fff;--line:#d9dce0;--mark:#1f5fa8;
--note:#fdf3e3}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e7e9ec;--soft:#a3abb5;--page:#15181c;--card:#1e2227;
--line:#3a4048;
--mark:#86b8f0;--note:#3a2f1c}
figure.plot svg{filter:invert(.885) hue-rotate(180deg)}}
*{box-sizing:border-box}body{margin:0 auto;max-width:60rem;padding:1rem 1rem 4rem;background:var(--page);
color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
overflow-wrap:anywhere}h1{font-size:1.6rem;line-height:1.2;margin:.6rem 0}h2{font-size:1.25rem;line-height:1.3;
margin:2.6rem 0 .4rem;padding-top:.9rem;border-top:1px solid var(--line)}h3{font-size:1.02rem;margin:1.6rem 0 .4rem}
p,ul,dl{margin:.5rem 0}a{color:var(--mark)}.soft,figcaption,caption{color:var(--soft);font-size:.86rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;background:var(--card);margin:.5rem 0}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}caption{text-align:left;
padding:.5rem .7rem}caption span{position:sticky;left:.7rem;display:inline-block;
max-width:calc(min(100vw,60rem) - 3.6rem)}th,td{padding:.4rem .7rem;text-align:right;white-space:nowrap;
border-top:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}th:first-child,td:first-child{text-align:left;
position:sticky;left:0;background:var(--card);white-space:normal;min-width:11rem}
sub,sup{line-height:0;font-size:.7em}tr.best td{font-weight:700}tr.guess td{font-style:italic}
td small{color:var(--soft);font-weight:400}.note{background:var(--note);border-radius:.5rem;padding:.5rem .8rem}
.figures{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
figure{margin:.4rem 0}figure.plot{background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.6rem;max-width:34rem}figure.plot svg{display:block;width:100%;height:auto}
nav ul{padding-left:1.2rem}nav li{margin:.15rem 0}pre{margin:.2rem 0;padding:.5rem .7rem;overflow-x:auto;
background:var(--card);border:1px solid var(--line);border-radius:.5rem;white-space:pre-wrap}
.grid{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}.grid figure{margin:0}
.grid div{display:flex;gap:2px}.grid img{width:calc((100% - 4px)/3);image-rendering:pixelated;border-radius:3px}
.facts{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.2rem 1rem;font-size:.9rem}.facts dt{
color:var(--soft)}.facts dd{margin:0}code{font-size:.85em;white-space:pre-wrap}
@media(max-width:32rem){.facts{grid-template-columns:1fr}.facts dd{margin-bottom:.4rem}h1{font-size:1.35rem}
body{padding:.7rem .8rem 3rem}figure.plot{padding:.3rem .1rem}figure.plot figcaption{padding:.3rem .5rem}
th,td{padding:.35rem .5rem}th:first-child,td:first-child{min-width:9rem}}
@media print{:root{--ink:#000;--soft:#444;--page:#fff;--card:#fff;--line:#bbb;--mark:#000;--note:#f4f4f4}
body{max-width:none;font-size:11pt}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
caption span{max-width:none}
table{font-size:8pt}th,td{padding:.2rem .35rem;white-space:normal}}
"""


def page(title: str, about: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
        title: Plain text.
        about: HTML below it.
        sections: Identifier, heading and content of each, the latter two as HTML.
    """
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{about}</p>']
    body += [f'<nav aria-label="Contents"><ul>{links}</ul></nav>', "<main>"]
    body += [f'<h2 id="{name}">{heading}</h2>\n{content}' for name, heading, content in sections] + ["</main>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def picture(figure: Figure, prefix: str, words: str) -> str:
    """A figure with its caption; `prefix` tells its identifiers from those of other figures."""
    svg = plots.to_svg(figure, prefix, words)
    return f'<figure class="plot">{svg}<figcaption>{escape(words)}</figcaption></figure>'


def table(caption: str, head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    """A table in its own scrolling box; cells are HTML."""
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join(f'<tr class="{kind}">{"".join(f"<td>{c}</td>" for c in cells)}</tr>' for cells, kind in rows)
    table = (
        f"<table><caption><span>{caption}</span></caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    )
    return f'<div class="scroll" tabindex="0">{table}</div>'


def rich(text: str) -> str:
    """Plain text as HTML, with its subscripts."""
    return re.sub(r"\b([AWR])_(δ|[\d.]+)", r"\1<sub>\2</sub>", escape(text))


def accuracy(r: Record | None) -> str:
    """In percent with its interval; a dash for none."""
    if r is None:
        return "–"
    return f"{100 * r.accuracy:.1f} <small>[{100 * r.accuracy_low:.1f}, {100 * r.accuracy_high:.1f}]</small>"


def number(value: float | None) -> str:
    """Four digits, or `null` for what isn't finite."""
    return "null" if value is None or not math.isfinite(value) else f"{value + 0.0:.4g}"


def share(value: float | None) -> str:
    """A ratio, or `null` where there is none."""
    return "null" if value is None else f"{value:.3f}"


def order(p: float) -> str:
    """`W_2` with its subscript, or `pointwise`."""
    return rich(figures.order_name(p))
