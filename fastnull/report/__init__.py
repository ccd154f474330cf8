"""Reports: runs and results become tables, plots and statements, as HTML and Markdown."""

from fastnull.report.page import DEMO, compose, write_report

__all__ = ["DEMO", "compose", "write_report"]
