"""The exercises of the lessons, one module for each; importing this package registers them all."""
from __future__ import annotations
