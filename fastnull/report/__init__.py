"""Reports of runs and results in HTML and Markdown, with tables, plots and statements."""

from fastnull.report.page import DEMO, compose, write_report

__all__ = ["DEMO", "compose", "write_report"]
