"""The parts of a report: each is HTML for the page, and the files that hold the same table, drawing or picture.

Jinja2 escapes all text that comes from a run (names, captions, reasons, commands); in drawings matplotlib does.
"""

import base64
import io
import math
import numbers
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from analysis.figures import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Direction = Literal["lower", "higher"]
_PIXELS_PER_INCH = 100
_LEAST_WIDTH = 560  # pixels: on a narrower screen a drawing scrolls
_UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Part:
    """A table, a drawing or a picture."""

    title: str = ""
    text: str = ""
    html: Markup = field(default_factory=Markup)
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Content by path in the report's folder."""


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    parts: Sequence[Part] = ()
    text: str = ""


def render(title: str, made: str, sections: Sequence[Section], **more: Any) -> str:
    """Returns the page. more: summary and warnings (lists of lines), footer."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_template("report.html.j2")).render(
        title=title,
        made=made,
        sections=[section for section in sections if section.parts or section.text],
        style=Markup(_template("style.css")),
        script=Markup(_template("sort.js")),
        **more,
    )
    return clean(page)


def clean(text: str) -> str:
    """Returns the text with replacement characters for those that HTML forbids: controls and lone surrogates."""
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


def table_files(name: str, frame: pd.DataFrame) -> dict[str, bytes]:
    """Returns a frame as CSV and as Parquet, without its index."""
    # Parquet has no columns of mixed types: they become text.
    texts = {
        str(column): frame[column].map(lambda x: None if x is None or x is pd.NA else clean(str(x)))
        for column in frame
        if frame[column].dtype == object
    }
    plain = frame.assign(**texts).rename(columns=lambda column: clean(str(column)))
    return {
        f"tables/{name}.csv": frame.to_csv(index=False).encode("utf-8", "replace"),
        f"tables/{name}.parquet": plain.to_parquet(None, index=False),
    }


def table(
    frame: pd.DataFrame,
    title: str = "",
    text: str = "",
    best: "Mapping[str, Direction] | None" = None,
    code: Sequence[str] = (),
    long: Sequence[str] = (),
    errors: Mapping[str, str] | None = None,
    sortable: bool = True,
    files: Mapping[str, bytes] | None = None,
) -> Part:
    """Returns a frame's columns as an HTML table, without its index.

    best: columns whose best value is bold, and which end is best. code, long: columns of commands and of
    sentences; with sentences, each row becomes a card on a narrow screen. errors: columns of means, and those of
    their standard errors, which are shown with them.
    """
    best, errors = best or {}, errors or {}
    columns: dict[Markup, list[Markup]] = {}
    for name, values in frame.drop(columns=list(errors.values())).items():
        head = Markup.escape(clean(str(name)))
        known = [value for value in values if not _is_missing(value)]
        numeric = bool(known) and all(map(_is_number, known))
        winner = _winner(known, best[name]) if name in best else None
        ses = frame[errors[name]] if name in errors else [None] * len(frame)
        looks = (numeric, winner, name in code, name == "verdict")
        cells = [_cell(value, se, *looks) for value, se in zip(values, ses, strict=True)]
        if name in long:
            cells = [Markup('<span class="long">{}</span>').format(cell) for cell in cells]
        if long and columns:
            cells = [
                Markup('<span class="head">{}: </span>{}').format(head, cell) for cell in cells
            ]
        columns[Markup('<span class="number">{}</span>').format(head) if numeric else head] = cells
    classes = ["sortable"] * sortable + ["sentences"] * bool(long)
    with pd.option_context("display.max_colwidth", None):
        html = pd.DataFrame(columns, dtype=object).to_html(
            index=False, escape=False, border=0, justify="unset", classes=classes
        )
    box = Markup('<div class="scroll" tabindex="0" role="region" aria-label="{}">{}</div>')
    return Part(title, text, box.format(title or "table", Markup(html)), files or {})


def drawing(figure: "Figure", name: str, title: str, text: str = "") -> Part:
    """Returns a figure as SVG in the page's own ink, and its files."""
    svg = clean(_save(figure, name, format="svg", metadata={"Date": None}).decode())
    inline = re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", svg[svg.index("<svg") :], count=2)
    width = round(figure.get_figwidth() * _PIXELS_PER_INCH)
    sizes = f"max-width:{width}px;min-width:{min(width, _LEAST_WIDTH)}px"
    opening = f'<svg role="img" aria-label="{Markup.escape(title)}" style="{sizes}"'
    inline = inline.replace("<svg", opening, 1).replace(INK, "currentColor")
    html = Markup('<figure class="drawn">{}</figure>').format(Markup(inline))
    content = {f"figures/{name}.svg": svg.encode(), f"figures/{name}.png": _png(figure)}
    return Part(title, text, html, content)


def picture(image: "Image.Image | Figure", name: str, title: str, text: str = "") -> Part:
    """Returns a picture as WebP, a fifth of the PNG so that a page with dozens opens fast, and its file."""
    png, webp = _png(image), io.BytesIO()
    with Image.open(io.BytesIO(png)) as read:
        width, height = read.size
        read.convert("RGB").save(webp, format="WEBP", quality=85, method=4)
    source = "data:image/webp;base64," + base64.b64encode(webp.getvalue()).decode()
    html = Markup('<figure><img src="{}" alt="{}" width="{}" height="{}"></figure>')
    files = {f"figures/{name}.png": png}
    return Part(title, text, html.format(source, title, width, height), files)


def shown(value: Any, se: float | None = None) -> str:
    """Returns a value as the page writes it: four digits, "–" if it is missing; a mean with its error."""
    if _is_missing(value):
        return "–"
    if not _is_number(value):
        return clean(str(value))
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        text = "∞" if number > 0 else "-∞"
    elif se is not None and se > 1e-6 * abs(number):
        # As many decimals as two digits of the error need.
        decimals = max(0, 1 - math.floor(math.log10(se)))
        text = f"{number:,.{decimals}f} ± {se:.{decimals}f}"
    elif number == int(number) and abs(number) < 1e15:
        text = f"{int(number):,}"
    else:
        text = f"{number:,.2f}" if abs(number) >= 100 else f"{number:.4g}"
    return text.replace("-", "−")


def _cell(
    value: Any, se: float | None, numeric: bool, winner: float | None, code: bool, verdict: bool
) -> Markup:
    text = Markup.escape(shown(value, se))
    if _is_missing(value):
        pass
    elif winner is not None and _is_number(value) and value == winner:
        text = Markup("<b>{}</b>").format(text)
    elif code:
        text = Markup("<code>{}</code>").format(text)
    elif verdict:
        text = Markup('<span class="verdict {}">{}</span>').format(text, text)
    if numeric or _is_missing(value):
        # What the column is sorted by; rows without a value come last.
        key = float(value) if _is_number(value) and math.isfinite(value) else ""
        look = Markup(' class="number"') if numeric else ""
        text = Markup('<data value="{}"{}>{}</data>').format(key, look, text)
    return text


def _save(figure: "Figure", salt: str = "", **options: Any) -> bytes:
    """Returns the file of a figure, with literal texts: a dollar sign in a name does not start a formula."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(clean(text.get_text()))
    buffer = io.BytesIO()
    # Without a salt, clip paths have random names and two reports of the same runs differ.
    with (
        matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": clean(salt)}),
        warnings.catch_warnings(),
    ):
        # A glyph that no font has is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _png(image: "Image.Image | Figure") -> bytes:
    if not isinstance(image, Image.Image):
        return _save(image, format="png", dpi=130, facecolor="white")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _winner(values: Sequence[Any], end: Direction) -> float | None:
    finite = [float(x) for x in values if _is_number(x) and math.isfinite(x)]
    # Of a single run nothing is best.
    if len(finite) < 2:
        return None
    return min(finite) if end == "lower" else max(finite)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value is not pd.NA


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT


def _template(name: str) -> str:
    return (files("analysis") / "templates" / name).read_text("utf-8")
