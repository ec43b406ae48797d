"""An overlay filesystem that does not hide errors."""

__version__ = "0.1.0"
