"""Tiles that were measured on a GPU, and the file that keeps them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from .candidates import KERNELS, Tile

#: What the first line of meaning of a file must say.
FORMAT = 1


class Row(NamedTuple):
    """One measurement: the fastest tile of a kernel at a shape."""

    kernel: str
    dtype: str
    rows: int
    experts: int
    d: int
    n: int
    tile: Tile
    microseconds: float
    #: What the cost model says of the same tile.
    predicted: float = 0.0


def bucket(rows: int) -> int:
    """Number the powers of two that rows lie nearest to."""
    return round(math.log2(rows)) if rows > 0 else -1


class Measured(NamedTuple):
    """What `moegen tune` wrote for one device."""

    device: str
    versions: dict[str, str]
    rows: tuple[Row, ...]

    def find(
        self, kernel: str, rows: int, experts: int, d: int, n: int, dtype: str
    ) -> Tile | None:
        """Return the tile measured at this shape, for at most twice or half the rows."""
        wanted = (kernel, dtype, experts, d, n)
        near = [
            row
            for row in self.rows
            if (row.kernel, row.dtype, row.experts, row.d, row.n) == wanted
            and abs(bucket(row.rows) - bucket(rows)) <= 1
        ]
        if not near:
            return None
        return min(near, key=lambda row: abs(math.log(row.rows / max(1, rows)))).tile


def read(path: Path) -> Measured:
    """Read a file of measurements; a broken one is a ValueError that says what is."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} is not {FORMAT}")
        rows = tuple(_row(row) for row in data["rows"])
        versions = {str(k): str(v) for k, v in data["versions"].items()}
        return Measured(str(data["device"]), versions, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is no table of tiles ({said}); `moegen tune` writes a new one, "
            "and without the file the cost model chooses"
        ) from error


def _row(data: dict[str, Any]) -> Row:
    row = Row(**{**data, "tile": Tile(**data["tile"])})
    if row.kernel not in KERNELS:
        raise ValueError(f"kernel {row.kernel!r} is unknown")
    for name in ("m", "n", "k", "warps"):
        size = getattr(row.tile, name)
        if type(size) is not int or size < 1 or size & (size - 1):
            raise ValueError(f"{name} of a tile is {size!r}, not a power of two")
    if not all(type(x) is int and x > 0 for x in row[2:6]):
        raise ValueError("rows, experts, d and n are whole numbers above 0")
    if type(row.tile.stages) is not int or row.tile.stages < 1:
        raise ValueError(f"stages of a tile is {row.tile.stages!r}")
    return row


def text(table: Measured) -> str:
    """Return the file of a table, a measurement a line."""
    rows = [
        json.dumps({**row._asdict(), "tile": row.tile._asdict()}) for row in table.rows
    ]
    head = json.dumps(
        {"format": FORMAT, "device": table.device, "versions": table.versions}
    )
    return head[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n"
