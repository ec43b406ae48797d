"""Use cases on real filesystems with real faults: what every system answers. See docs/judge.md."""
