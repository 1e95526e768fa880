"""One self-contained HTML file about a bundle."""

from edgeport.report.render import render_report, strip_evidence
from edgeport.report.waterfall import Waterfall, make_waterfall

__all__ = ["Waterfall", "make_waterfall", "render_report", "strip_evidence"]
