"""Tables of who chose what, and of what is known of users or items: a folder of CSV files becomes entities with attributes.

``ratings.csv`` or ``interactions.csv`` has a row for each choice: a column whose name begins with *user* or *customer*, and one whose name begins with
*item*, *movie*, *product*, *book* or *article*. A row counts as a choice whatever its rating is. Beside it lies a table of attributes: ``users.csv``
where new **users** shall be served, else ``items.csv`` (or movies, products, books, articles) for new **items**. The rows of this table are the entities,
those of the other side are what is recommended to them. Where both tables are there and ``users.csv`` has attributes, users are the entities.

In the table of attributes, a column whose name begins as above or is ``id`` names the entity, ``title`` or ``name`` is for people, ``split`` may say train, val
or test. Every other column is an attribute: numbers where all of its cells are numbers, else words separated by ``|``, each a flag (what stands in
parentheses, as MovieLens' "(no genres listed)", is none). A title that ends in a year, "Toy Story (1995)", gives a flag for its five years, "1995-1999".
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paperworks.data.layouts import SPLITS, Problem
from paperworks.data.packs import source_path
from paperworks.data.splits import SHARE
from paperworks.errors import InputError

LEAST = 5
"""Entities with fewer choices are left out, and so are flags of fewer training entities."""
MOST = 200
"""Flags that are made of one column at most, the most frequent ones."""
CHOICES = ("ratings.csv", "interactions.csv")
USERS = ("users.csv", "customers.csv")
ITEMS = ("items.csv", "movies.csv", "products.csv", "books.csv", "articles.csv")
_USER = ("user", "customer")
_ITEM = ("item", "movie", "product", "book", "article")
_TITLES = ("title", "name")
_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True)
class Column:
    """How cells become attributes."""

    name: str
    kind: str
    """``number``, ``flags`` (words separated by ``|``) or ``years`` (the five years of a title's end)."""
    values: tuple[str, ...] = ()
    """The words that are flags."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of what comes out."""
        return (self.name,) if self.kind == "number" else self.values

    def read(self, cell: str, where: str) -> list[float]:
        """The attributes of one cell; unknown words are none of the flags.

        Raises:
            InputError: no number where there must be one.
        """
        if self.kind == "number":
            return [number(cell, f"{where}: {self.name}")]
        there = words(cell) if self.kind == "flags" else years(cell)
        return [float(value in there) for value in self.values]


def number(cell: str, where: str) -> float:
    """A finite number.

    Raises:
        InputError: it is none.
    """
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where} is {cell!r} where a number must be; correct the cell")
    return value


def words(cell: str) -> set[str]:
    """The words of a cell, separated by ``|``; what stands in parentheses is none."""
    return {word for part in cell.split("|") if (word := part.strip()) and not (word[0] == "(" and word[-1] == ")")}


def years(title: str) -> set[str]:
    """The five years to which the year in which a title ends belongs."""
    found = _YEAR.search(title)
    first = int(found[1]) // 5 * 5 if found else 0
    return {f"{first}-{first + 4}"} if found else set()


@dataclass(frozen=True)
class Entity:
    """A user or an item with what is known of it."""

    name: str
    title: str
    cells: Mapping[str, str]
    """Its row of the table, by column."""
    attributes: tuple[float, ...]
    chosen: np.ndarray
    """Indexes of what it was chosen with, on the other side."""


@dataclass
class Interactions:
    """A folder of tables, read."""

    source: str
    root: Path
    cold: str
    """``users`` or ``items``: whose attributes there are."""
    columns: tuple[Column, ...]
    others: tuple[str, ...]
    """The other side: those chosen with a training entity at least."""
    titles: tuple[str, ...]
    """Of the others; empty texts where there is no table of them."""
    train: list[Entity]
    val: list[Entity]
    test: list[Entity]
    problems: list[Problem]
    sha256: str

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes."""
        return tuple(name for column in self.columns for name in column.attributes)

    def describe(self) -> dict[str, Any]:
        """What a person wants to know before training; the classes are the attributes that entities have or have not."""
        table = np.array([e.attributes for e in (*self.train, *self.val)])
        flags = [(i, name) for i, name in enumerate(self.attributes) if np.isin(table[:, i], (0.0, 1.0)).all()]
        entities = [*self.train, *self.val, *self.test]
        return {
            "source": self.source,
            "root": str(self.root),
            "layout": f"{self.cold} with attributes, recommended to them: {'items' if self.cold == 'users' else 'users'}",
            "items": len(entities),
            "splits": {"train": len(self.train), "val": len(self.val), "test": len(self.test)},
            "others": len(self.others),
            "choices": sum(len(e.chosen) for e in entities),
            "attributes": list(self.attributes),
            "classes": [{"name": name, "share": round(float(table[:, i].mean()), 6)} for i, name in flags],
            "sha256": self.sha256,
            "problems": [{"path": str(p.path), "what": p.what, "fix": p.fix} for p in self.problems],
        }


def looks_like_interactions(path: Path) -> bool:
    """Whether a folder holds choices and a table of attributes, from names alone."""
    return path.is_dir() and _one_of(path, CHOICES) is not None and _one_of(path, (*USERS, *ITEMS)) is not None


def open_interactions(source: str | Path) -> Interactions:
    """Read a folder or ``pack:NAME``.

    Raises:
        InputError: a table or column is missing, a cell is broken, or too little is left.
    """
    root = source_path(source)
    choices = _one_of(root, CHOICES)
    if choices is None:
        raise InputError(f"{root} holds no {' or '.join(CHOICES)}; put a table there with a row for each choice: user, item")
    users, items = _one_of(root, USERS), _one_of(root, ITEMS)
    cold, table = ("users", users) if users and _attribute_names(users) else ("items", items)
    if table is None:
        raise InputError(f"{root} holds no table of attributes; add users.csv (for new users) or items.csv (for new items)")
    rows = _table(table, _USER if cold == "users" else _ITEM)
    titles = _titles(items if cold == "users" else users, _ITEM if cold == "users" else _USER)
    pairs = _pairs(choices)
    chosen: dict[str, set[str]] = defaultdict(set)
    for user, item in pairs:
        entity, other = (user, item) if cold == "users" else (item, user)
        chosen[entity].add(other)
    problems = []
    if strange := sorted(chosen.keys() - rows.keys()):
        problems.append(
            Problem(
                choices, f"has {len(strange)} {cold} that {table.name} lacks, {strange[0]!r} first", "add them there, or leave them out"
            )
        )
    kept = [name for name in rows if len(chosen[name]) >= LEAST]
    if len(kept) < 2:
        raise InputError(
            f"{root}: {len(kept)} {cold} have attributes and {LEAST} choices at least; two are needed, and some hundreds to learn"
        )
    split = _splits(table, {name: rows[name] for name in kept})
    columns = _columns(table, {name: rows[name] for name in kept}, [name for name in kept if split[name] == "train"])
    others = sorted({other for name in kept if split[name] == "train" for other in chosen[name]}, key=_natural)
    index = {other: i for i, other in enumerate(others)}
    by_split: dict[str, list[Entity]] = {"train": [], "val": [], "test": []}
    for name in kept:
        known = np.array(sorted(index[o] for o in chosen[name] if o in index), dtype=np.int64)
        if not len(known):
            problems.append(Problem(choices, f"joins {name!r} only with what no training entity was chosen with", "it is left out"))
            continue
        cells = rows[name]
        by_split[split[name]].append(Entity(name, _title(cells), cells, attributes_of(columns, cells, f"{table}, {name}"), known))
    if not by_split["train"] or not by_split["val"]:
        raise InputError(
            f"{root}: {len(by_split['train'])} training and {len(by_split['val'])} validation {cold}; add some, or a column split"
        )
    return Interactions(
        str(source),
        root,
        cold,
        columns,
        tuple(others),
        tuple(titles.get(other, "") for other in others),
        by_split["train"],
        by_split["val"],
        by_split["test"],
        problems,
        _digest([choices, *(t for t in (users, items) if t)]),
    )


def attributes_of(columns: Sequence[Column], cells: Mapping[str, str], where: str) -> tuple[float, ...]:
    """The attributes of one row.

    Raises:
        InputError: a number is none.
    """
    return tuple(value for column in columns for value in column.read(cells[column.name], where))


def read_new(path: Path, columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, str], tuple[float, ...]]]:
    """The rows of a table of new entities: name, cells by column (lower case), attributes.

    Args:
        path: the table. Its first column names the entity where none is called as in training.
        columns: what is read, as in ``plain_columns``.

    Raises:
        InputError: a column is missing or a cell is broken.
    """
    wanted = [Column(c["name"], c["kind"], tuple(c["values"])) for c in columns]
    header, rows = _rows(path)
    missing = [c.name for c in wanted if c.name not in header]
    if missing:
        raise InputError(
            f"{path} lacks the column {missing[0]!r}; it has {', '.join(header)}, and the model was trained with attributes of that name"
        )
    found = []
    names = next((h for h in header if h == "id" or h.startswith((*_USER, *_ITEM))), header[0])
    for line, cells in rows:
        where = f"{path}, line {line}"
        if not cells[names]:
            raise InputError(f"{where}: {names} is empty; name the entity")
        found.append((cells[names], cells, attributes_of(wanted, cells, where)))
    if not found:
        raise InputError(f"{path} has no rows; give a table with a row for each new entity")
    return found


def plain_columns(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Columns as plain values for JSON."""
    return [{**asdict(column), "values": list(column.values)} for column in columns]


def write_table(path: Path, entities: Sequence[Entity]) -> None:
    """The rows of some entities as a table that :func:`read_new` reads."""
    with path.open("w", encoding="utf-8", newline="") as f:
        sheet = csv.DictWriter(f, list(entities[0].cells))
        sheet.writeheader()
        sheet.writerows(e.cells for e in entities)


def _one_of(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _rows(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """The header in lower case, and every row with its line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as text ({type(error).__name__}); save it as CSV in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip().lower() for name in next(reader, [])]
    if len(header) < 2 or len(set(header)) < len(header) or "\0" in text:
        raise InputError(f"{path} has no header of two and more different names, separated by commas; write one into its first line")

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        for cells in reader:
            if len(cells) not in (0, len(header)):
                raise InputError(f"{path}, line {reader.line_num} has {len(cells)} cells where the header has {len(header)}; correct it")
            if cells:
                yield reader.line_num, dict(zip(header, map(str.strip, cells)))

    return header, rows()


def _named(path: Path, header: Sequence[str], beginnings: Sequence[str]) -> str:
    found = next((h for h in header if h.startswith(tuple(beginnings))), None)
    if found is None:
        raise InputError(
            f"{path} has the columns {', '.join(header)}, none of which begins with {' or '.join(beginnings)}; rename the one that is meant"
        )
    return found


def _pairs(path: Path) -> list[tuple[str, str]]:
    header, rows = _rows(path)
    user, item = _named(path, header, _USER), _named(path, header, _ITEM)
    pairs = []
    for line, cells in rows:
        if not cells[user] or not cells[item]:
            raise InputError(f"{path}, line {line}: {user if not cells[user] else item} is empty; write its id or remove the line")
        if "rating" in cells:
            number(cells["rating"], f"{path}, line {line}: rating")
        pairs.append((cells[user], cells[item]))
    if not pairs:
        raise InputError(f"{path} has no rows; add one for each choice")
    return pairs


def _is_attribute(name: str) -> bool:
    return name not in ("id", "split", *_TITLES) and not name.startswith((*_USER, *_ITEM))


def _attribute_names(path: Path) -> list[str]:
    return [name for name in _rows(path)[0] if _is_attribute(name)]


def _table(path: Path, beginnings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Entity -> its cells by column."""
    header, rows = _rows(path)
    key = "id" if "id" in header else _named(path, header, beginnings)
    table: dict[str, dict[str, str]] = {}
    for line, cells in rows:
        if not cells[key] or cells[key] in table:
            raise InputError(
                f"{path}, line {line}: {key} is {'empty' if not cells[key] else f'{cells[key]!r} for the second time'}; correct it"
            )
        table[cells[key]] = cells
    return table


def _titles(path: Path | None, beginnings: Sequence[str]) -> dict[str, str]:
    return {name: _title(cells) for name, cells in _table(path, beginnings).items()} if path else {}


def _title(cells: Mapping[str, str]) -> str:
    return next((cells[name] for name in _TITLES if cells.get(name)), "")


def _columns(path: Path, rows: Mapping[str, Mapping[str, str]], training: Sequence[str]) -> tuple[Column, ...]:
    found = []
    for name in next(iter(rows.values())):
        cells = [row[name] for row in rows.values()]
        if name in _TITLES:
            column = _flags(name, "years", years, rows, training)
        elif not _is_attribute(name):
            continue
        elif any(cells) and all(_numeric(cell) for cell in cells if cell):
            column = Column(name, "number")
        else:
            column = _flags(name, "flags", words, rows, training)
        if column.attributes:
            found.append(column)
    if not found:
        raise InputError(
            f"{path} has no attributes that {LEAST} training rows share; add columns with numbers or with words separated by |"
        )
    return tuple(found)


def _flags(name: str, kind: str, of: Callable[[str], set[str]], rows: Mapping[str, Mapping[str, str]], training: Sequence[str]) -> Column:
    counts = Counter(word for entity in training for word in sorted(of(rows[entity][name])))
    return Column(name, kind, tuple(sorted(word for word, n in counts.most_common(MOST) if n >= LEAST)))


def _numeric(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _splits(path: Path, rows: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What the column ``split`` says, or a hash of the names."""
    if "split" in next(iter(rows.values())):
        for name, cells in rows.items():
            if cells["split"].lower() not in SPLITS:
                raise InputError(f"{path}: the split of {name} is {cells['split']!r}; write train, val or test")
        return {name: SPLITS[cells["split"].lower()] for name, cells in rows.items()}
    ordered = sorted(rows, key=_draw)
    val = {name for name in ordered[1:-1] if _draw(name) < SHARE} | {ordered[0]}
    return {name: "val" if name in val else "train" for name in rows}


def _draw(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _natural(name: str) -> tuple[int, str]:
    """Numbers by their size, then words."""
    return (int(name) if name.isdecimal() else 2**62, name)


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
