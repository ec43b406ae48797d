"""Syscalls that Python lacks, and nothing else: no policy. Each raises OSError as its man page says."""
