"""What lessons are made of: figures, widgets, exercise checks and the notebook tools.

The rest of the library does not need this package (the command line borrows `drawing` and
`lessons`). Lessons use the names below; matplotlib and nbclient are imported when they are first
needed.
"""

from __future__ import annotations

from trackkit.course.checks import check, solution, summary
from trackkit.course.figures import (
    figure_curves,
    figure_frames,
    figure_heatmap,
    figure_lines,
    figure_success,
    show,
    show_source,
)
from trackkit.course.widgets import Explorer, Player, choice, number, switch
from trackkit.drawing import animation, draw_boxes

__all__ = [
    "Explorer",
    "Player",
    "animation",
    "check",
    "choice",
    "draw_boxes",
    "figure_curves",
    "figure_frames",
    "figure_heatmap",
    "figure_lines",
    "figure_success",
    "number",
    "show",
    "show_source",
    "solution",
    "summary",
    "switch",
]
