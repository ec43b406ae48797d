"""Eyes on an upper: flush it, see its errors without taking them from the host, and keep its ledger."""

from overt.upper.upper import Upper, Uppers

__all__ = ["Upper", "Uppers"]
