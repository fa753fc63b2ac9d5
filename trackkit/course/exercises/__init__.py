"""The exercises of the lessons, one module for each; importing this package registers them all."""

from __future__ import annotations

from trackkit.course.exercises import lesson00, lesson01, lesson02, lesson03

__all__ = ["lesson00", "lesson01", "lesson02", "lesson03"]
