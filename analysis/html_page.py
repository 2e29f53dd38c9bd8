"""The report as one HTML file that needs nothing beside it: tables, drawings and pictures are all inside.

Everything that comes from a run (names, captions, reasons, commands) passes through Jinja2's escaping, and in
drawings through matplotlib's, which is kept from reading mathematics between dollar signs.
"""

import base64
import io
import math
import numbers
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

Direction = Literal["min", "max"]
_PIXELS_PER_INCH = 100
_LEAST = 560  # pixels: a drawing that is smaller on a phone can be moved instead
_UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_VERDICTS = {"supported": "supported", "contradicted": "contradicted"}


class Measure(float):
    """A mean that is shown with its standard error."""

    se: float

    def __new__(cls, mean: float, se: float) -> "Measure":
        made = super().__new__(cls, mean)
        made.se = se
        return made


@dataclass(frozen=True)
class Cell:
    text: str
    key: "float | str | None" = None
    """What the column is sorted by; "" where there is no value."""
    number: bool = False
    best: bool = False
    code: bool = False
    long: bool = False
    verdict: str = ""


@dataclass(frozen=True)
class Head:
    text: str
    number: bool


@dataclass(frozen=True)
class Part:
    """A table, a drawing or a picture of a section."""

    kind: Literal["table", "svg", "image", "text"]
    title: str = ""
    text: str = ""
    heads: Sequence[Head] = ()
    rows: Sequence[Sequence[Cell]] = ()
    sortable: bool = False
    has_sentences: bool = False
    svg: Markup = field(default_factory=Markup)
    source: str = ""
    alt: str = ""
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    parts: Sequence[Part]
    text: str = ""


def render(title: str, made: str, sections: Sequence[Section], **more: Any) -> str:
    """The page. more: summary and warnings (lists of lines), footer."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_template("report.html.j2"))
    page = template.render(
        title=title,
        made=made,
        sections=[section for section in sections if section.parts or section.text],
        style=Markup(_template("style.css")),
        script=Markup(_template("sort.js")),
        **more,
    )
    return clean(page)


def clean(text: str) -> str:
    """The text without characters that neither HTML nor XML may hold: controls and halves of a pair."""
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


def table(
    frame: pd.DataFrame,
    title: str = "",
    text: str = "",
    best: "Mapping[str, Direction] | None" = None,
    code: Sequence[str] = (),
    long: Sequence[str] = (),
    sortable: bool = True,
) -> Part:
    """A frame's columns as they stand; its index is not shown.

    best: columns whose best value is bold, and which end is best. code, long: columns of commands, and of
    sentences.
    """
    winners = {name: _winner(frame[name], end) for name, end in (best or {}).items()}
    numeric = {
        name: any(_is_number(value) for value in frame[name])
        and all(_is_number(value) or _is_missing(value) for value in frame[name])
        for name in frame.columns
    }
    rows = [
        [
            _cell(
                value,
                numeric[name],
                best=name in winners and _is_number(value) and value == winners[name],
                code=name in code,
                long=name in long,
                verdict=_VERDICTS.get(str(value), "open") if name == "verdict" else "",
            )
            for name, value in zip(frame.columns, row, strict=True)
        ]
        for row in frame.itertuples(index=False)
    ]
    heads = [Head(str(name), numeric[name]) for name in frame.columns]
    return Part("table", title, text, heads, rows, sortable, has_sentences=bool(long))


def drawing(figure: "Figure", title: str, text: str = "") -> Part:
    """A figure as SVG in the page's own ink."""
    svg = svg_text(figure, title)
    svg = re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", svg[svg.index("<svg") :], count=2)
    width = round(figure.get_figwidth() * _PIXELS_PER_INCH)
    sizes = f"max-width:{width}px;min-width:{min(width, _LEAST)}px"
    style = f'<svg role="img" aria-label="{Markup.escape(title)}" style="{sizes}"'
    svg = svg.replace("<svg", style, 1).replace(INK, "currentColor")
    return Part("svg", title, text, svg=Markup(svg))


def picture(image: "Image.Image | Figure", title: str, text: str = "") -> Part:
    """A picture as WebP, a fifth of the PNG: dozens of grids of photos must open fast."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png_bytes(image))) as read:
        width, height = read.size
        read.convert("RGB").save(buffer, format="WEBP", quality=85, method=4)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Part("image", title, text, source=source, alt=title, width=width, height=height)


def svg_text(figure: "Figure", salt: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Else clip paths would have random names, and two reports of the same runs would differ.
    with matplotlib.rc_context({"svg.hashsalt": clean(salt)}), _as_written(figure):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return clean(buffer.getvalue())


@contextmanager
def _as_written(figure: "Figure") -> Iterator[None]:
    """Texts of a figure are drawn as they stand: a dollar sign in a name begins no mathematics."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(clean(text.get_text()))
    # A glyph that no font has is a box, and no warning.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def png_bytes(image: "Image.Image | Figure") -> bytes:
    buffer = io.BytesIO()
    if isinstance(image, Image.Image):
        image.save(buffer, format="PNG", optimize=True)
    else:
        with _as_written(image):
            image.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def shown(value: Any) -> str:
    """A value as the page writes it: four digits, "–" for what is missing, NaN and infinity by name."""
    if _is_missing(value):
        return "–"
    if _is_number(value):
        number = float(value)
        if isinstance(value, Measure) and value.se > 1e-6 * abs(number):
            # As many decimals as the error's two digits have.
            decimals = max(0, 1 - math.floor(math.log10(value.se)))
            return f"{number:,.{decimals}f} ± {value.se:.{decimals}f}".replace("-", "−")
        if math.isnan(number):
            return "NaN"
        if math.isinf(number):
            return "∞" if number > 0 else "−∞"
        if number == int(number) and abs(number) < 1e15:
            return f"{int(number):,}".replace("-", "−")
        digits = f"{number:,.2f}" if abs(number) >= 100 else f"{number:.4g}"
        return digits.replace("-", "−")
    return clean(str(value))


def _cell(value: Any, number: bool, **looks: Any) -> Cell:
    if _is_missing(value):
        return Cell("–", key="", number=number)
    if number:
        key: float | str = float(value) if math.isfinite(value) else ""
        return Cell(shown(value), key=key, number=True, **looks)
    return Cell(shown(value), **looks)


def _winner(values: pd.Series, end: Direction) -> float | None:
    finite = [float(x) for x in values if _is_number(x) and math.isfinite(x)]
    # Of a single run nothing is best.
    if len(finite) < 2:
        return None
    return min(finite) if end == "min" else max(finite)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value is not pd.NA


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT


def _template(name: str) -> str:
    return (files("analysis") / "templates" / name).read_text("utf-8")
