"""One HTML file that tells a person what ``compare`` or ``claim`` found, and opens without a network.

Everything is inside the file: the style, the script, the charts (SVG) and the pictures (data URIs). Its content security policy
allows nothing else, so that a hostile file name can neither run nor fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from paperworks.files import atomic
from paperworks.tasks import drawing

METRICS: dict[str, tuple[str, str, int]] = {
    "dice": ("Dice", "Dice 系数", 1),
    "iou": ("IoU", "交并比", 1),
    "boundary_f": ("Boundary F", "边界 F 值", 1),
    "accuracy": ("Pixel accuracy", "像素准确率", 1),
}
"""Names (English, Chinese) of well-known metrics, and 1 where larger is better; another metric goes by its key."""
ERRORS = (
    (drawing.MISSED, ("missed (hatched)", "漏检（斜线）")),
    (drawing.FALSE, ("false alarm", "误检")),
    (drawing.CONFUSED, ("one class for another", "类别混淆")),
)
"""What the colours of ``drawing.error_map`` mean."""
IMAGES = 200
"""Rows of the table of images."""
SIDE = 640
"""Longest side in pixels of an embedded picture."""
PLAIN_BYTES = 60_000
"""Picture files up to this size are embedded as they are."""
POINTS = 120
"""Points of a learning curve."""


def write_report(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``folder/report.html`` for the content of a ``compare.json`` or ``claim.json``, whole or not at all.

    Only ``kind``, ``title`` and (of a comparison) ``rows`` must be there. Paths of pictures are relative to ``folder``.

    Raises:
        ValueError: ``kind`` is neither ``compare`` nor ``claim``.
    """
    folder = Path(folder)
    page = render(result, folder)
    with atomic(folder / "report.html") as temporary:
        # A file name that is no UTF-8 reaches us with lone surrogates; it must not cost the person the report.
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))
    return folder / "report.html"


def render(result: Mapping[str, Any], folder: Path) -> str:
    """The page as a string; see ``write_report``."""
    kinds = {"compare": _compare, "claim": _claim}
    if result.get("kind") not in kinds:
        raise ValueError(f"a report is of kind 'compare' or 'claim', not {result.get('kind')!r}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.loader.get_source(environment, "report.js")[0]  # type: ignore[union-attr]
    environment.globals |= {
        "t": both,
        "attribute": attribute,
        "style": Markup(environment.loader.get_source(environment, "report.css")[0]),  # type: ignore[union-attr]
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    environment.filters |= {"decimal": decimal, "si": si, "duration": duration, "said": _said}
    context = kinds[result["kind"]](result, Path(folder))
    return environment.get_template(f"{result['kind']}.html").render(r=result, **context)


# --- Words and numbers ------------------------------------------------------------------------------------------------------------


def both(en: object, zh: object = None) -> Markup:
    """Text in both languages; the page shows one of them. One text stands for both where ``zh`` is None or the same."""
    en, zh = escape(en), escape(en if zh is None else zh)
    return en if en == zh else Markup('<span lang="en">{}</span><span lang="zh">{}</span>').format(en, zh)


def attribute(name: str, en: object, zh: object) -> Markup:
    """An attribute such as ``alt`` in both languages; the script puts in the one that is shown."""
    return Markup('{0}="{1}" data-en-{0}="{1}" data-zh-{0}="{2}"').format(name, en, zh)


def _said(text: Any) -> Markup:
    """``{"en": ..., "zh": ...}``, either of them, or a plain string."""
    if isinstance(text, Mapping):
        en, zh = text.get("en"), text.get("zh")
        return both(en or zh or "", zh or en or "")
    return both(text or "")


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def decimal(value: Any, digits: int = 3) -> str:
    """A number for the eye; a dash where there is none."""
    x = number(value)
    if x is None:
        return "–"
    if x and (abs(x) >= 1000 or abs(x) < 10**-digits):
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
    return f"{x:.{digits}f}"


def si(value: Any) -> str:
    """A number with k, M, G or T, to three figures; whole numbers below a thousand as they are."""
    x = number(value)
    if x is None:
        return "–"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= 0.9995 * size:
            return f"{three(x / size)} {prefix}"
    return str(int(x)) if x == int(x) else three(x)


def three(value: Any) -> str:
    """A number to three figures, without an exponent from 0.001 on; larger ones to the unit."""
    x = number(value)
    if x is None:
        return "–"
    if 0 < abs(x) < 0.001:
        return f"{x:.1e}"
    figures = len(str(int(abs(float(f"{x:.3g}"))))) if abs(x) >= 1 else 0 if abs(x) >= 0.1 or not x else -1 if abs(x) >= 0.01 else -2
    return f"{x:,.{max(0, 3 - figures)}f}"


def duration(value: Any) -> str:
    """Seconds as ``42.0 s``, ``12 min 05 s`` or ``3 h 20 min``."""
    x = number(value)
    if x is None:
        return "–"
    if x < 120:
        return f"{x:.1f} s"
    if x < 7200:
        return f"{round(x) // 60} min {round(x) % 60:02d} s"
    return f"{round(x / 60) // 60} h {round(x / 60) % 60:02d} min"


def _metric(key: str) -> tuple[str, str]:
    return METRICS[key][:2] if key in METRICS else (key, key)


# --- Tables -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """A number in a table."""

    text: str
    value: float | None = None
    key: bool = False
    """The script must sort by ``value``, since the text does not begin with it."""
    note: str = ""
    below: bool = False
    """The note stands on a line of its own."""
    best: bool = False


@dataclass
class Column:
    """A column of numbers. The best values are marked where at least two differ; several that read the same are all best."""

    label: Markup
    cells: Sequence[Cell]
    better: int = 0
    """1: larger is better, -1: smaller is, 0: neither."""
    note: str = ""

    def __post_init__(self) -> None:
        there = [cell for cell in self.cells if cell.value is not None]
        if self.better and len({cell.text for cell in there}) > 1:
            top = max(there, key=lambda cell: self.better * (cell.value or 0.0))
            for cell in there:
                cell.best = cell.text == top.text

    def __bool__(self) -> bool:
        return any(cell.value is not None for cell in self.cells)


@dataclass
class Table:
    """Columns beside one head per row: a method (a mapping) or a plain name."""

    caption: Markup
    head: Markup
    rows: Sequence[Any]
    columns: Sequence[Column]
    sorted_by: int = -1

    def __post_init__(self) -> None:
        self.columns = [column for column in self.columns if column]

    def __bool__(self) -> bool:
        return bool(self.rows and self.columns)


def _decimals(values: Iterable[Any], digits: int = 3, notes: Iterable[str] | None = None) -> list[Cell]:
    values = list(values)
    return [Cell(decimal(v, digits), number(v), note=n) for v, n in zip(values, notes or [""] * len(values), strict=True)]


def _sizes(values: Iterable[Any], write: Any = si) -> list[Cell]:
    return [Cell(write(v), number(v), key=True) for v in values]


# --- The comparison ---------------------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """A row of the comparison, with every mapping there."""

    raw: Mapping[str, Any]
    metric: str
    index: int = 0
    """Its colour in the charts."""
    recommended: bool = False
    metrics: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = str(self.raw.get("id") or self.raw.get("name") or "?")
        self.name = str(self.raw.get("name") or self.id)
        self.baseline = self.raw.get("kind") == "baseline"
        self.status = self.raw.get("status") or "ok"
        self.metrics = self.raw.get("metrics") or {}
        self.cost = self.raw.get("cost") or {}
        self.failed = self.status == "failed" or (self.status != "ok" and not self.metrics)

    @property
    def dashes(self) -> tuple[float, ...]:
        """Of its curves: neighbours in the table differ in colour, and every third in dashes too."""
        return _DASHES[self.index // 3 % len(_DASHES)]

    @property
    def quality(self) -> float | None:
        """The comparison's own metric."""
        return None if self.failed else number(self.metrics.get(self.metric))

    def latency(self, mode: str, batch: str = "1", which: str = "p50") -> float | None:
        """Milliseconds a batch."""
        return number((((self.cost.get("latency_ms") or {}).get(mode) or {}).get(batch) or {}).get(which))

    @property
    def quickest(self) -> tuple[float | None, str]:
        """Milliseconds for one image in the quickest form, and that form's name."""
        times = [(x, mode) for mode in self.cost.get("latency_ms") or {} if (x := self.latency(mode)) is not None]
        return min(times, default=(None, ""))


def _compare(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    metric = str(result.get("metric") or "dice")
    better = -1 if result.get("higher_is_better") is False else 1
    chosen = (result.get("recommended") or {}).get("id")
    methods = [Method(raw, metric) for raw in result.get("rows") or []]
    methods.sort(key=lambda m: (m.failed, m.quality is None, -better * (m.quality or 0.0)))
    for i, method in enumerate(methods):
        method.index = i
        method.recommended = chosen is not None and method.id == chosen
    done = [m for m in methods if not m.failed]
    modes = list(dict.fromkeys(mode for m in done for mode in m.cost.get("latency_ms") or {}))
    name = _metric(metric)
    use = next((m for m in done if m.recommended), None)
    seeds = max((len(m.raw.get("seeds") or [0]) for m in done), default=1)
    pictures = _pictures(result.get("pictures") or [], methods, metric, folder)
    return {
        "metric": name,
        "methods": methods,
        "use": use,
        "commands": _commands(use),
        "seeds": seeds,
        "main": _main_table(methods, metric, better),
        "fronts": _fronts(done, name, better),
        "curves": _curves(done, name, better),
        "pictures": pictures,
        "views": [v for v in ("errors", "overlay") if any(view.get(v) for p in pictures for view in p["views"])],
        "errors": [(_rgb(colour), *words) for colour, words in ERRORS],
        "colours": [(_rgb(drawing.colour(i)), name) for i, name in enumerate(_shares(result)) if i],
        "classes": _class_tables(done, metric, better, result),
        "images": _image_table(done, metric, better),
        "costs": _cost_table(done, modes),
        "shares": [(name, _percent(share)) for name, share in _shares(result).items()],
        "used_metrics": [k for k in METRICS if k == metric or any(k in m.metrics for m in done)],
    }


def _main_table(methods: list[Method], metric: str, better: int) -> Table:
    ok = [m if not m.failed else Method({}, metric) for m in methods]
    keys = [metric, *dict.fromkeys(k for m in ok for k in m.metrics if "/" not in k and k != metric)]
    columns = []
    for key in keys:
        spread = [number((m.raw.get("spread") or {}).get(key)) for m in ok]
        notes = ["" if s is None else f"± {decimal(s)}" for s in spread]
        direction = better if key == metric else METRICS[key][2] if key in METRICS else 0
        columns.append(Column(both(*_metric(key)), _decimals([m.metrics.get(key) for m in ok], notes=notes), direction))
    columns += [
        Column(both("Parameters", "参数量"), _sizes(m.cost.get("params") for m in ok), -1),
        Column(both("FLOPs", "计算量 FLOPs"), _sizes(m.cost.get("flops") for m in ok), -1),
        Column(both("Latency", "延迟"), [Cell(three(m.quickest[0]), m.quickest[0], key=True, note=m.quickest[1], below=True) for m in ok], -1, "ms"),
        Column(both("Peak memory", "峰值内存"), _sizes((m.cost.get("peak_memory_mib") for m in ok), _whole), -1, "MiB"),
        Column(both("Training", "训练用时"), _sizes((m.cost.get("train_seconds") for m in ok), duration)),
    ]
    caption = both(
        "All methods on the validation images, best first. A frame marks the best value of a column; select a column's head to sort.",
        "各方法在验证图像上的结果，从好到差排列。带框者为该列最佳；点击表头可排序。",
    )
    return Table(caption, both("Method", "方法"), methods, columns, sorted_by=0)


def _whole(value: Any) -> str:
    x = number(value)
    return "–" if x is None else f"{x:,.0f}"


def _commands(use: Method | None) -> list[tuple[Markup, str]]:
    if use is None or not use.raw.get("run"):
        return []
    run = shlex.quote(str(use.raw["run"]))
    return [
        (both("Use it on new images", "用于新图像"), f"paperworks predict {run} IMAGES --out predictions"),
        (both("Take it elsewhere (ONNX, checked)", "导出 ONNX（附一致性检查）"), f"paperworks export {run} --out model.onnx"),
    ]


def _shares(result: Mapping[str, Any]) -> dict[str, float | None]:
    classes = (result.get("data") or {}).get("classes") or []
    return {str(c["name"]): number(c.get("pixels")) for c in classes if c.get("name")}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{three(100 * share)} %"


def _class_tables(done: list[Method], metric: str, better: int, result: Mapping[str, Any]) -> list[Table]:
    """One table for each metric that is known per class, the comparison's own first."""
    shares = _shares(result)
    found = dict.fromkeys(tuple(k.split("/", 1)) for m in done for k in m.metrics if "/" in k)
    metrics = sorted(dict.fromkeys(head for head, _ in found), key=lambda head: head != metric)
    order = list(shares)
    tables = []
    for head in metrics:
        classes = sorted((c for h, c in found if h == head), key=lambda c: order.index(c) if c in shares else len(order))
        columns = []
        for name in classes:
            direction = better if head == metric else METRICS[head][2] if head in METRICS else 0
            share = shares.get(name)
            note = "" if share is None else f"{_percent(share)} px"
            columns.append(Column(both(name), _decimals([m.metrics.get(f"{head}/{name}") for m in done]), direction, note))
        label = _metric(head)
        caption = both(f"{label[0]} of each class", f"各类别的{label[1]}")
        tables.append(Table(caption, both("Method", "方法"), done, columns))
    return [table for table in tables if table]


def _image_table(done: list[Method], metric: str, better: int) -> dict[str, Any] | None:
    """The images that the papers find hardest first, since those are the ones that a person looks for."""
    values: dict[str, dict[str, float | None]] = {}
    shown = [m for m in done if m.raw.get("per_image")]
    for m in shown:
        for entry in m.raw["per_image"]:
            values.setdefault(str(entry.get("name")), {})[m.id] = number(entry.get(metric))
    judges = [m.id for m in shown if not m.baseline] or [m.id for m in shown]

    def mean(name: str) -> float:
        seen = [v for i in judges if (v := values[name].get(i)) is not None]
        return better * sum(seen) / len(seen) if seen else math.inf

    names = sorted(values, key=mean)
    if not names:
        return None
    columns = [Column(both(m.name), _decimals(values[n].get(m.id) for n in names[:IMAGES])) for m in shown]
    label = _metric(metric)
    caption = both(f"{label[0]} of each image, hardest first", f"每张图像的{label[1]}，由难到易")
    return {"table": Table(caption, both("Image", "图像"), names[:IMAGES], columns), "total": len(names)}


def _cost_table(done: list[Method], modes: list[str]) -> Table:
    done = [m for m in done if m.cost]
    costs = [m.cost for m in done]
    columns = []
    for mode in modes:
        batches = {b for m in done for b in ((m.cost.get("latency_ms") or {}).get(mode) or {})}
        for batch in sorted(batches, key=lambda b: (not b.isdigit(), int(b) if b.isdigit() else 0, b)):
            cells = []
            for m in done:
                p50, p95 = m.latency(mode, batch), m.latency(mode, batch, "p95")
                cells.append(Cell(three(p50), p50, key=True, note="" if p95 is None else three(p95)))
            columns.append(Column(both(mode), cells, -1, f"batch {batch} · ms"))
    columns += [
        Column(both("Peak memory", "峰值内存"), _sizes((c.get("peak_memory_mib") for c in costs), _whole), -1, "MiB"),
        Column(both("Training", "训练用时"), _sizes((c.get("train_seconds") for c in costs), duration)),
        Column(both("Steps", "步数"), _sizes((c.get("steps") for c in costs), _whole)),
        Column(both("Samples", "样本"), _sizes((c.get("samples_per_second") for c in costs), three), 1, "/s"),
        Column(both("ONNX error", "ONNX 误差"), _sizes((c.get("export_error") for c in costs), lambda v: _error(number(v)))),
    ]
    caption = both(
        "Latency is the median time of one batch, with the 95th percentile in small type behind it.",
        "延迟为处理一个批次所需时间的中位数，其后小字为第 95 百分位。",
    )
    return Table(caption, both("Method", "方法"), done, columns)


def _error(x: float | None) -> str:
    return "–" if x is None else f"{x:.0e}" if x else "0"


# --- Pictures ---------------------------------------------------------------------------------------------------------------------


def _pictures(pictures: Sequence[Mapping[str, Any]], methods: list[Method], metric: str, folder: Path) -> list[dict[str, Any]]:
    out = []
    for picture in pictures:
        views = []
        for m in methods:
            entry = (picture.get("rows") or {}).get(m.id)
            if entry:
                view = {k: _embed(entry.get(k), folder) for k in ("errors", "overlay")}
                views.append({"method": m, "value": decimal(entry.get(metric)), **view})
        given = {k: _embed(picture.get(k), folder) for k in ("input", "truth")}
        out.append({"name": str(picture.get("name") or ""), "views": views, **given})
    return out


def _rgb(colour: tuple[int, int, int]) -> str:
    return f"rgb({colour[0]} {colour[1]} {colour[2]})"


def _embed(path: Any, folder: Path) -> dict[str, Any] | None:
    """A picture of the folder as a data URI with its size; None where there is no readable one inside the folder."""
    if not path:
        return None
    file = (folder / str(path)).resolve()
    if not file.is_relative_to(folder.resolve()):
        return None
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "").lower()
            width, height = image.size
            if len(data) > PLAIN_BYTES or kind not in ("png", "jpeg", "webp"):
                image.draft("RGB", (SIDE, SIDE))
                small = image.convert("RGB")
                small.thumbnail((SIDE, SIDE))
                buffer = io.BytesIO()
                small.save(buffer, "WEBP", quality=88, method=2)
                data, kind, (width, height) = buffer.getvalue(), "webp", small.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(data).decode()}", "width": width, "height": height}


# --- Charts -----------------------------------------------------------------------------------------------------------------------
# matplotlib writes plain colours and one language. The charts are drawn with stand-ins for both, which are replaced by CSS variables
# (light and dark) and by the two languages. So no text of a person's ever reaches matplotlib: neither its maths mode nor its fonts.

_INK, _MUTED, _LINE, _PAPER = "#010101", "#020202", "#030303", "#040404"
_SERIES = 10
_DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
_SIZE = 10.0
"""Points of the charts' text; a chart is about 390 points wide, which is a phone's width."""


class _Words:
    """Hands out ASCII stand-ins about as wide as the text, and puts the text into the finished SVG."""

    def __init__(self) -> None:
        self.texts: list[Markup] = []

    def __call__(self, en: str, zh: str | None = None) -> str:
        en, zh = _short(en), _short(zh if zh is not None else en)
        spans = Markup('<tspan lang="en">{}</tspan><tspan lang="zh">{}</tspan>').format(en, zh)
        self.texts.append(escape(en) if en == zh else spans)
        return f"q{len(self.texts) - 1:02d}".ljust(round(_width(en) / _width("n")), "n")

    def fill(self, svg: str) -> str:
        return re.sub(r">q(\d+)n*<", lambda match: f">{self.texts[int(match[1])]}<", svg)


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _width(text: str, size: float = _SIZE) -> float:
    """About how wide a text is in points; Chinese characters are square."""
    return size * sum(1.0 if ord(c) > 0x2E7F else 0.57 for c in text)


def _series(index: int) -> str:
    return f"#0500{index % _SERIES:02d}"


def _figure(width: float = 5.4, height: float = 3.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=72, layout=None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(colors=_MUTED, labelsize=_SIZE, length=3, color=_LINE)
    axes.grid(True, color=_LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _place(figure: Figure, axes: Axes, *, right: float = 8, left: float = 40, top: float = 24, bottom: float = 40) -> None:
    """Margins in points."""
    width, height = figure.get_size_inches() * 72
    axes.set_position((left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height))


def _labels(axes: Axes, words: _Words, x: tuple[str, str], y: tuple[str, str]) -> None:
    axes.set_xlabel(words(*x), color=_MUTED, fontsize=_SIZE, labelpad=6)
    # A horizontal title instead of a turned label: it reads in both languages.
    axes.annotate(words(*y), (0, 1), (-34, 10), "axes fraction", "offset points", color=_MUTED, fontsize=_SIZE, annotation_clip=False)


def _svg(figure: Figure, words: _Words, key: str, en: str, zh: str) -> Markup:
    """The figure as inline SVG: own ids, page's colours and fonts, both languages."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" {attribute("aria-label", en, zh)}>', svg, count=1)
    svg = re.sub(r'<g id="series-(\d+)[^"]*"', r'<g data-series="\1"', svg)
    svg = re.sub(r'<g id="halo[^"]*"', '<g class="halo"', svg)
    svg = re.sub(r' id="(?:[a-z]+_\d+|patch[^"]*|text[^"]*)"', "", svg)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{key}-', svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, name in ((_INK, "ink"), (_MUTED, "muted"), (_LINE, "line"), (_PAPER, "card")):
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"#0500(\d\d)", lambda match: f"var(--s{int(match[1])})", svg)
    return Markup(words.fill(re.sub(r"\n\s*", "\n", svg)))


def _tick(value: float, _: int) -> str:
    text = si(float(f"{value:.6g}"))
    return re.sub(r"(\.\d*?)0+(?= |$)", r"\1", text).replace(". ", " ").removesuffix(".")


def _log_ticks(axes: Axes, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low / 1.5, high * 1.9)
    subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))


def front(points: Sequence[tuple[float, float]], better: int = 1) -> list[int]:
    """Indices of the Pareto front of (cost, quality), cheapest first: no other point is at least as cheap and as good, and differs."""
    best, out = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -better * points[i][1])):
        if better * points[i][1] > best:
            best = better * points[i][1]
            out.append(i)
    return out


def _fronts(done: list[Method], metric: tuple[str, str], better: int) -> list[dict[str, Any]]:
    costs = (
        ("latency", ("Latency of one image, ms", "单张图像延迟（ms）"), lambda m: m.quickest[0]),
        ("parameters", ("Parameters", "参数量"), lambda m: number(m.cost.get("params"))),
    )
    baselines = [m for m in done if m.baseline and m.quality is not None]
    out = []
    for key, label, cost in costs:
        shown = [(m, x, m.quality) for m in done if not m.baseline and (x := cost(m)) and x > 0 and m.quality is not None]
        if len(shown) < 2:
            continue
        on = front([(x, y) for _, x, y in shown], better)
        chart = _front_chart(key, label, metric, better, shown, on, baselines)
        out.append({"svg": chart, "label": label, "names": [shown[i][0].name for i in on]})
    return out


def _front_chart(
    key: str,
    label: tuple[str, str],
    metric: tuple[str, str],
    better: int,
    shown: list[tuple[Method, float, float]],
    on: list[int],
    baselines: list[Method],
) -> Markup:
    figure, axes = _figure()
    words = _Words()
    xs, ys = [x for _, x, _ in shown], [y for _, _, y in shown]
    _log_ticks(axes, min(xs), max(xs))
    # A method that went wrong would press those that are to be told apart into a line; it stands on the edge with its value.
    signed = [better * y for y in ys]
    floor = max(signed) - 3 * (max(signed) - float(np.median(signed)))
    inside = [y for y, s in zip(ys, signed) if s >= floor]
    span = max(inside) - min(inside) or 0.05 * abs(inside[0]) or 0.1
    bottom, top = min(inside) - 0.15 * span, max(inside) + 0.15 * span
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    _place(figure, axes, left=44)
    _labels(axes, words, label, metric)
    frame = axes.get_window_extent()
    taken = []
    for m in baselines:
        if bottom <= (y := m.quality or 0.0) <= top:
            axes.axhline(y, color=_MUTED, linewidth=1, linestyle=(0, (1.5, 2)))
            size = (_width(_short(m.name)), _SIZE)
            note = axes.annotate(words(m.name), (0, y), (4, 3), ("axes fraction", "data"), "offset points", fontsize=_SIZE, color=_MUTED)  # type: ignore[arg-type]
            note.set_gid(f"halo-baseline-{m.index}")
            taken.append(_box(frame.x0 + 4 + size[0] / 2, axes.transData.transform((1, y))[1] + 3 + _SIZE / 2, *size))

    line = [(xs[i], ys[i]) for i in on]
    axes.plot(
        [x for x, _ in line] + [axes.get_xlim()[1]],
        [y for _, y in line] + [line[-1][1]],
        drawstyle="steps-post",
        color=_MUTED,
        linewidth=1.2,
        linestyle=(0, (4, 3)),
    )
    spots = []
    for i, (m, x, y) in enumerate(shown):
        off = better * y < floor
        where = min(max(y, bottom), top)
        axes.plot(
            [x],
            [where],
            ("v" if y < bottom else "^") if off else "o",
            markersize=8,
            markerfacecolor=_series(m.index) if i in on else _PAPER,
            markeredgecolor=_series(m.index),
            markeredgewidth=1.6,
            clip_on=False,
            gid=f"series-{m.index}-dot",
        )
        spots.append((x, where, f"{m.name} {decimal(y)}" if off else m.name, m, i in on))
    taken += [_box(*axes.transData.transform((x, y)), 11, 11) for x, y, *_ in spots]
    for x, y, text, m, bold in spots:
        centre = axes.transData.transform((x, y))
        size = (_width(_short(text)) * (1.06 if bold else 1.0), _SIZE + 2)
        offset, box = _free(centre, size, taken, (frame.x0, frame.y0, frame.x1 + 8, frame.y1 + 10))
        taken.append(box)
        style = {"color": _INK if bold else _MUTED, "fontsize": _SIZE, "fontweight": "bold" if bold else "normal"}
        note = axes.annotate(
            words(text), (x, y), offset, "data", "offset points", ha="center", va="center", annotation_clip=False, zorder=5, **style
        )
        note.set_gid(f"halo-{m.index}")
    names = ", ".join(shown[i][0].name for i in on)
    en = f"{metric[0]} against {label[0]}. On the Pareto front: {names}."
    zh = f"{metric[1]}与{label[1]}的关系。帕累托前沿：{names}。"
    return _svg(figure, words, key, en, zh)


Box = tuple[float, float, float, float]


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _free(centre: Sequence[float], size: tuple[float, float], taken: list[Box], frame: Box) -> tuple[tuple[float, float], Box]:
    """Where around a point a label of ``size`` covers least of what is there: its centre's offset and its box."""

    def cost(box: Box) -> float:
        over = sum(max(0.0, min(box[2], t[2]) - max(box[0], t[0])) * max(0.0, min(box[3], t[3]) - max(box[1], t[1])) for t in taken)
        out = max(0.0, frame[0] - box[0]) + max(0.0, box[2] - frame[2]) + max(0.0, frame[1] - box[1]) + max(0.0, box[3] - frame[3])
        return over + 20 * out

    beside, above = size[0] / 2 + 8, size[1] / 2 + 7
    offsets = [(beside, 0.0), (0.0, above), (0.0, -above), (-beside, 0.0)]
    offsets += [(sx * (beside - 3), sy * far) for far in (above - 2, 2 * above, 3 * above) for sx in (1, -1) for sy in (1, -1)]
    boxes = [_box(centre[0] + dx, centre[1] + dy, *size) for dx, dy in offsets]
    best = min(range(len(offsets)), key=lambda i: cost(boxes[i]) + 0.1 * i)
    return offsets[best], boxes[best]


def _curves(done: list[Method], metric: tuple[str, str], better: int) -> dict[str, Any] | None:
    """Quality while training, and the training loss."""
    quality, loss = [], []
    timed = all((m.raw.get("curves") or {}).get("seconds") for m in done if m.raw.get("curves"))
    for m in done:
        c = m.raw.get("curves") or {}
        step, seconds = list(c.get("step") or []), list(c.get("seconds") or [])
        at = list(c.get("val_step") or [])
        if timed and len(step) == len(seconds) and len(step) > 1:
            when = c.get("val_seconds") or (np.interp(at, step, seconds).tolist() if at else [])
            quality.append((m, *_points(when, c.get("val_metric"))))
        elif not timed:
            quality.append((m, *_points(at, c.get("val_metric"))))
        loss.append((m, *_points(step, c.get("loss"))))
    x = ("Seconds of training", "训练时间（秒）") if timed else ("Steps", "训练步数")
    end = "lower" if better < 0 else "upper"
    charts = [
        _curve_chart("quality", x, (f"{metric[0]}, validation", f"验证集{metric[1]}"), quality, end),
        _curve_chart("loss", ("Steps", "训练步数"), ("Training loss", "训练损失"), loss, "lower"),
    ]
    charts = [c for c in charts if c]
    if not charts:
        return None
    drawn = {m.index: m for rows in (quality, loss) for m, xs, _ in rows if len(xs)}
    return {"charts": charts, "methods": [drawn[i] for i in sorted(drawn)]}


def _points(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Finite points, at most ``POINTS`` of them: means of neighbours where there are more."""
    n = min(len(x or []), len(y or []))
    a = np.array([math.nan if number(v) is None else v for v in (x or [])[:n]], dtype=float)
    b = np.array([math.nan if number(v) is None else v for v in (y or [])[:n]], dtype=float)
    keep = np.isfinite(a) & np.isfinite(b)
    a, b = a[keep], b[keep]
    if len(a) > POINTS:
        parts = np.array_split(np.arange(len(a)), POINTS)
        a, b = (np.array([v[p].mean() for p in parts]) for v in (a, b))
    return a, b


def _curve_chart(
    key: str, x: tuple[str, str], y: tuple[str, str], rows: list[tuple[Method, np.ndarray, np.ndarray]], end: str
) -> Markup | None:
    rows = [row for row in rows if len(row[1])]
    if not rows:
        return None
    figure, axes = _figure()
    words = _Words()
    everything = np.concatenate([ys for _, _, ys in rows])
    if end == "lower" and everything.min() > 0 and everything.max() > 10 * everything.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}"))
    for m, xs, ys in rows:
        marker = "o" if len(xs) == 1 else None
        style = {"linestyle": (0, m.dashes)} if m.dashes else {}
        axes.plot(xs, ys, color=_series(m.index), linewidth=1.8, marker=marker, gid=f"series-{m.index}-curve", **style)
    last = max(float(xs[-1]) for _, xs, _ in rows)
    axes.set_xlim(0, last * 1.02 or 1)
    if last < 1000:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    longest = max(_width(_short(m.name, 22)) for m, _, _ in rows)
    _place(figure, axes, left=44, right=longest + 16)
    _labels(axes, words, x, y)
    ends = [float(axes.transData.transform((xs[-1], ys[-1]))[1]) for _, xs, ys in rows]
    frame = axes.get_window_extent()
    for (m, xs, ys), height in zip(rows, _spread(ends, _SIZE + 2.5, frame.y0 - 4, frame.y1 + 4), strict=True):
        px, py = axes.transData.transform((xs[-1], ys[-1]))
        link = np.array([[px, py], [frame.x1 + 2, py], [frame.x1 + 8, height]])
        data = axes.transData.inverted().transform(link)
        axes.plot(*data.T, color=_series(m.index), linewidth=0.6, clip_on=False, gid=f"series-{m.index}-link")
        offset = (frame.x1 + 10 - px, height - py)
        text = words(_short(m.name, 22))
        note = axes.annotate(text, (xs[-1], ys[-1]), offset, "data", "offset points", va="center", fontsize=_SIZE, annotation_clip=False)
        note.set_color(_series(m.index))
        note.set_gid(f"series-{m.index}-name")
    names = ", ".join(m.name for m, _, _ in rows)
    return _svg(figure, words, key, f"{y[0]} against {x[0].lower()}: {names}.", f"{y[1]}随{x[1]}的变化：{names}。")


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The values moved apart to ``gap``, in their order, inside [low, high] where that is possible."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    out = list(values)
    for before, i in zip([None, *order], order):
        out[i] = max(values[i], low if before is None else out[before] + gap)
    for after, i in zip([None, *reversed(order)], reversed(order)):
        out[i] = min(out[i], high if after is None else out[after] - gap)
    return out


# --- The claim --------------------------------------------------------------------------------------------------------------------


def _claim(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    arms = [arm for arm in result.get("arms") or [] if arm.get("name")]
    metric = str(result.get("metric") or "")
    values = {id(arm): {k: list(v or []) for k, v in (arm.get("metrics") or {}).items()} for arm in arms}
    longest = max((len(v[metric]) for v in values.values() if metric in v), default=0)
    seeds = list(result.get("seeds") or range(longest))
    columns = []
    for i, seed in enumerate(seeds):
        cells = _decimals([_at(values[id(arm)].get(metric), i) for arm in arms], 4)
        columns.append(Column(both(f"Seed {seed}", f"种子 {seed}"), cells))
    columns += _mean_columns([values[id(arm)].get(metric, []) for arm in arms], both("Mean", "均值"))
    others = dict.fromkeys(k for v in values.values() for k in v if k != metric)
    more = [c for k in others for c in _mean_columns([values[id(arm)].get(k, []) for arm in arms], both(*_metric(k)))]
    name = _metric(metric)
    head = both("Arm", "实验组")
    return {
        "metric": name,
        "seeds": seeds,
        "chart": _arms_chart(arms, [values[id(arm)].get(metric, []) for arm in arms], name),
        "main": Table(both(f"{name[0]} of each arm and seed", f"各实验组、各种子的{name[1]}"), head, arms, columns),
        "more": Table(both("The other metrics: mean and standard deviation over the seeds", "其他指标：各种子的均值与标准差"), head, arms, more),
    }


def _at(values: list[Any] | None, i: int) -> Any:
    return values[i] if values and i < len(values) else None


def _mean_columns(rows: list[list[Any]], label: Markup) -> list[Column]:
    cells = []
    for row in rows:
        seen = [x for v in row if (x := number(v)) is not None]
        mean = sum(seen) / len(seen) if seen else None
        note = f"± {decimal(float(np.std(seen, ddof=1)), 4)}" if len(seen) > 1 else ""
        cells.append(Cell(decimal(mean, 4), mean, note=note))
    return [Column(label, cells)]


def _arms_chart(arms: list[Mapping[str, Any]], values: list[list[Any]], metric: tuple[str, str]) -> Markup | None:
    """One line of dots per arm; a thread joins the dots of one seed, since arms are compared seed by seed."""
    seen = [[number(v) for v in row] for row in values]
    flat = [v for row in seen for v in row if v is not None]
    if not flat:
        return None
    figure, axes = _figure(5.4, 0.75 + 0.7 * len(arms))
    words = _Words()
    for i in range(max(map(len, seen))):
        thread = [(row[i], -k) for k, row in enumerate(seen) if i < len(row) and row[i] is not None]
        axes.plot([x for x, _ in thread], [y for _, y in thread], color=_MUTED, linewidth=0.7, alpha=0.7)
    for k, (arm, row) in enumerate(zip(arms, seen, strict=True)):
        xs = [x for x in row if x is not None]
        control = bool(arm.get("control"))
        axes.plot(
            xs,
            [-k] * len(xs),
            "s" if control else "o",
            markersize=8,
            markerfacecolor=_PAPER if control else _series(k),
            markeredgecolor=_series(k),
            markeredgewidth=1.6,
            linestyle="none",
        )
        if xs:
            mean = sum(xs) / len(xs)
            axes.plot([mean, mean], [-k - 0.2, -k + 0.2], color=_INK, linewidth=2)
            note = axes.annotate(decimal(mean), (mean, -k), (0, -17), "data", "offset points", ha="center", fontsize=_SIZE, color=_INK)
            note.set_gid("halo-mean")
        text = words(f"{arm['name']} (control)" if control else str(arm["name"]), f"{arm['name']}（对照）" if control else None)
        note = axes.annotate(text, (0, -k), (4, 13), ("axes fraction", "data"), "offset points", fontsize=_SIZE, color=_INK)  # type: ignore[arg-type]
        note.set_gid("halo-arm")
    span = max(flat) - min(flat) or 0.05 * abs(max(flat)) or 0.1
    axes.set_xlim(min(flat) - 0.12 * span, max(flat) + 0.12 * span)
    axes.set_ylim(-len(arms) + 0.4, 0.75)
    axes.yaxis.set_major_locator(FixedLocator([]))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.spines["left"].set_visible(False)
    _place(figure, axes, left=10, right=14, top=4)
    axes.set_xlabel(words(*metric), color=_MUTED, fontsize=_SIZE, labelpad=6)
    means = "; ".join(f"{arm['name']} {decimal(sum(x) / len(x))}" for arm, row in zip(arms, seen) if (x := [v for v in row if v is not None]))
    return _svg(figure, words, "arms", f"{metric[0]} of each arm, one dot per seed. Means: {means}.", f"各实验组的{metric[1]}，每点为一个种子。均值：{means}。")
