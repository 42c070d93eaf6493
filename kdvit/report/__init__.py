"""One self-contained HTML page about a run, or about several beside each other: `write_report`."""

from kdvit.report.page import write_report

__all__ = ["write_report"]
