"""Tuning: every sound way to compute a problem, checked against the oracle, timed beside native, remembered.

``session`` shares the time among the problems, ``contest`` finds the winner of one: ``entrants`` says who takes
part, ``final`` who wins. ``bench`` holds its operands and checks its candidates, ``search`` asks Optuna what to try
(nothing else imports optuna), ``result`` is what comes back, ``factory`` finds a model by name and ``problems`` what it
computes.
"""

from __future__ import annotations

from adaptconv.tuner.factory import autocast_for, load_factory
from adaptconv.tuner.result import TuneError, TuneResult, TuneRow
from adaptconv.tuner.session import tune, tune_problems

__all__ = ["TuneError", "TuneResult", "TuneRow", "autocast_for", "load_factory", "tune", "tune_problems"]
