"""Cells and records that the tests of the load test's arithmetic are made of."""

from dataclasses import replace

from loadtests.load import pictures
from loadtests.load.cells import Asking, Cell, Load
from loadtests.load.records import Record

ASKING = Asking("m")


def cell(budget="full", load=Load("closed", 1), **asked):  # noqa: B008
    return Cell(0, "run", budget, load, "http://x", "pool", "folder", "photos", pictures.SIZES,
                replace(ASKING, **asked))  # fmt: skip


def record(ended, seconds=1.0, **more):
    return Record(0, ended - seconds, ended, **{"ttft": 0.5, "kept": 64, "full": 576, **more})
