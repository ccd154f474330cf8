"""Experiments over several runs: comparisons at equal compute, the demo, searches for noise settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.experiments.compare import run_compare
    from fastnull.experiments.demo import DemoSettings, run_demo
    from fastnull.experiments.noise_tuning import try_settings
    from fastnull.experiments.settings import CompareSettings
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        "fastnull.experiments.compare",
        "fastnull.experiments.demo",
        "fastnull.experiments.noise_tuning",
        "fastnull.experiments.settings",
    )

__all__ = ["CompareSettings", "DemoSettings", "run_compare", "run_demo", "try_settings"]
