"""Analyses of exact and approximate nullspaces, and of transfer between models.

Each module computes rows of plain numbers; `run` writes them with a protocol and a figure (`fastnull analyze`).
"""

from fastnull.analysis.run import ANALYSES, Analysis, AnalysisSettings, analyze, write_analysis
from fastnull.analysis.small import small_model

__all__ = ["ANALYSES", "Analysis", "AnalysisSettings", "analyze", "small_model", "write_analysis"]
