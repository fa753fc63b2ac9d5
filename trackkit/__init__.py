"""trackkit: a course on visual object tracking, and the small library behind it."""

__version__ = "0.1.0"
