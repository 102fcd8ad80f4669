"""One self-contained HTML page: no outside resources, light and dark, on paper and on a phone."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child, .facts td { text-align: left; }
thead th { background: var(--soft); white-space: normal; vertical-align: bottom; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.facts td:first-child { white-space: nowrap; }
small, .soft { opacity: 0.75; } figure { margin: 0 0 1rem; }
.examples { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
.examples img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
.right { color: #2a9d4a; } .wrong { color: #d8433b; }
.warn { border-left: 4px solid #d0781f; padding: 0 1rem; background: var(--soft); }
.warn h2 { margin-top: 0; padding-top: 0.6rem; } .warn ul { padding-bottom: 0.6rem; }
@media print { body { max-width: none; margin: 0; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } .wide { overflow: visible; }
  table { font-size: 0.7rem; } th, td { padding: 0.15rem 0.3rem; white-space: normal; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document; `parts` are HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>"
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption class='soft'>{escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; cells are text, escaped here."""
    top = "".join(f"<th scope='col'>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are; escaped here."""
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(told)}</td></tr>" for name, told in rows
    )
    return f"<div class='wide'><table class='facts'><tbody>{lines}</tbody></table></div>"


def picture(image: Image.Image, description: str) -> str:
    """An <img> that carries its data."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/jpeg;base64,{data}">'
