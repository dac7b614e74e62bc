"""What a run is (`Run`), and how it trains."""

from .run import Run

__all__ = ["Run"]
