"""A metric: its name, what kind it is, which question it answers, and how it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ..counters.histogram import Histogram

S = TypeVar("S")
# The values of a metric's own labels, and the number.
Reading = tuple[Sequence[str], float | Histogram]


class Kind(StrEnum):
    """What a metric is to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family(Generic[S]):
    """One metric, read from subjects of one kind: the models, or the server."""

    # as Prometheus shows it; a counter's ends with _total
    name: str
    kind: Kind
    # what it counts, as its documentation says it
    question: str
    read: Callable[[S], Iterable[Reading]]
    # beside those of the subject
    labels: tuple[str, ...] = ()

    def of(self, subjects: Sequence[tuple[Sequence[str], S]], labels: Sequence[str]) -> Metric:
        """The metric with all its series. `labels`: those by which the subjects are told apart."""
        names = [*labels, *self.labels]
        match self.kind:
            case Kind.COUNTER:
                counter = CounterMetricFamily(self.name, self.question, labels=names)
                for values, number in self._read(subjects):
                    counter.add_metric(values, _plain(number))
                return counter
            case Kind.GAUGE:
                gauge = GaugeMetricFamily(self.name, self.question, labels=names)
                for values, number in self._read(subjects):
                    gauge.add_metric(values, _plain(number))
                return gauge
            case Kind.HISTOGRAM:
                histogram = HistogramMetricFamily(self.name, self.question, labels=names)
                for values, number in self._read(subjects):
                    if isinstance(number, Histogram):
                        histogram.add_metric(values, *_buckets(number))
                return histogram

    def _read(
        self, subjects: Sequence[tuple[Sequence[str], S]]
    ) -> Iterator[tuple[list[str], float | Histogram]]:
        for values, subject in subjects:
            for own, number in self.read(subject):
                yield [*values, *own], number


def _plain(number: float | Histogram) -> float:
    return number.sum if isinstance(number, Histogram) else number


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Its buckets as Prometheus counts them, each with all below it; and the sum."""
    total_s, counts = histogram.sum, histogram.counts.copy()
    found, up_to = [], 0
    for bound, count in zip([*histogram.bounds, math.inf], counts, strict=True):
        up_to += count
        found.append((_text(bound), float(up_to)))
    return found, total_s


def _text(bound: float) -> str:
    return "+Inf" if bound == math.inf else str(bound)
