"""What commands write for a browser: one file that opens from a disk, without scripts or a network, and prints.

A page is a string of HTML in which all texts that come from elsewhere have been escaped. It may show only pictures that
stand inside it, and run nothing: its policy says so to the browser.
"""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cnnmpi.common.arrays import Array
from cnnmpi.common.text import printable

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
EXACT = 48  # pixels a side up to which each of them counts
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --pale: #5c6570; --line: #d8dde3; --soft: #f3f5f7;
  --c0: #0b62c4; --c1: #c2410c; --c2: #15803d; --c3: #8b2fc9; --c4: #a16207;
  --c5: #0e7490; --c6: #be185d; --c7: #4d7c0f }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ec; --pale: #9aa4af;
  --line: #363d45; --soft: #1e2329; --c0: #6cb2ff; --c1: #ff9a62; --c2: #5fd38a; --c3: #cf9cff; --c4: #e5c04b;
  --c5: #5fd0e6; --c6: #ff8fc0; --c7: #b5dc6a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: .4rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem } p { margin: .4rem 0 }
a { color: var(--c0) } code { font-size: .92em } .pale, figcaption { color: var(--pale); font-size: .88rem }
nav a { margin-right: .8rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .18rem .55rem; border-bottom: 1px solid var(--line); text-align: right; overflow-wrap: normal }
th { color: var(--pale); font-weight: 600 } th:first-child, td:first-child { text-align: left }
table.words td, table.words th { text-align: left; vertical-align: top; overflow-wrap: anywhere }
.tiles, .charts, .cards { display: grid; gap: .8rem }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)) }
.tiles div { background: var(--soft); border-radius: .5rem; padding: .5rem .8rem }
.tiles b { display: block; font-size: 1.25rem } .tiles span { color: var(--pale); font-size: .85rem }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.cards { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)) }
figure { margin: 0; break-inside: avoid } figure svg { width: 100%; height: auto; display: block }
figcaption svg.mark { width: 22px; height: 8px; display: inline; stroke-width: 2.5 }
.cards figure { background: var(--soft); border-radius: .5rem; padding: .5rem; font-size: .82rem }
.cards img { width: 100%; height: auto; max-width: 128px; display: block; margin: 0 auto .3rem }
img.pixels { image-rendering: pixelated } img { max-width: 100% }
@media print { body { max-width: none; padding: 0; font-size: 11px } nav { display: none } .wide { overflow: visible } }
"""


def escape(text: object) -> str:
    """Return ``text`` as HTML shows it; control characters as escapes."""
    return html.escape(printable(text))


def page(title: str, body: str, style: str = "") -> str:
    """Return the whole document around ``body``, which is HTML; ``style`` is CSS of its own."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}{style}</style>\n'
        f"</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def table(head: Sequence[object], rows: Sequence[Sequence[object]], words: bool = False) -> str:
    """Return a table of cells, which are texts; columns of ``words`` begin at the left, of numbers end at the right."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    lines = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table{" class=words" if words else ""}>{top}<tbody>\n{lines}\n</tbody></table></div>'


def tiles(values: Sequence[tuple[str, object]]) -> str:
    """Return boxes side by side, a large value over each name."""
    boxes = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values)
    return f'<div class="tiles">{"".join(boxes)}</div>'


def card(pixels: Array, alt: str, lines: Sequence[str]) -> str:
    """Return an image (H, W, C) of uint8 over ``lines`` of text."""
    return f"<figure>{picture(pixels, alt)}{'<br>'.join(escape(line) for line in lines)}</figure>"


def picture(pixels: Array, alt: str, largest: int = 128) -> str:
    """Return an image (H, W, C) or (H, W) of uint8, made smaller where a side exceeds ``largest`` pixels.

    Up to 48 pixels a side it is shown pixel by pixel; larger ones, as JPEG, take a fifth of the bytes.
    """
    if pixels.ndim == 3 and pixels.shape[2] != 3:  # of one channel, or as many as only a machine sees
        pixels = pixels[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((largest, largest))
    file = io.BytesIO()
    kind, look = ("JPEG", "") if max(image.size) > EXACT and image.mode != "RGBA" else ("PNG", ' class="pixels"')
    image.save(file, kind, optimize=True, quality=80)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    width, height = image.size
    return f'<img{look} src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'
