"""Byte layouts, each declared once. Floor 0: nothing here performs I/O or knows what the bytes are for."""
