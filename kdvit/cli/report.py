"""``kdvit report``: run folders in, one HTML page out."""

from __future__ import annotations

from collections.abc import Sequence

from kdvit.cli.parser import Parser
from kdvit.report import write_report

_EXAMPLE = """examples:
  kdvit report runs/first
  kdvit report runs/quickstart/distilled --baseline runs/quickstart/alone
  kdvit report runs/compare/distilled/* --baseline runs/compare/alone/seed0 --output compare.html
"""


def main(argv: Sequence[str]) -> None:
    parser = Parser("kdvit report", description="Write one HTML page about runs.", epilog=_EXAMPLE)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the first is the subject")
    parser.add_argument("--baseline", metavar="RUN", help="what the subject is measured against: the student alone")
    parser.add_argument("--output", default="report.html", help="the page [%(default)s]")
    arguments = parser.parse_args(argv)
    output = write_report(arguments.runs, arguments.output, baseline=arguments.baseline)
    print(f"written: {output} ({output.stat().st_size / 2**20:.1f} MiB)")
