"""Changes to files, worked out before they are made, so that they can be shown without being made."""

import os
from pathlib import Path
from typing import NamedTuple


class Change(NamedTuple):
    """A file to be written, or, without a content, removed."""

    path: Path
    content: str | None
    mode: int = 0o644
    """of a new file; one that is there keeps its own"""

    def __str__(self) -> str:
        return f"remove {self.path}" if self.content is None else f"write {self.path} ({len(self.content)} bytes)"

    def diff(self) -> str:
        """What would be different, as diff -u shows it. OSError."""
        import difflib  # slow to import, and the wrapper starts for every command of a runtime

        before = self.path.read_text() if self.path.exists() else ""
        sides = ("/dev/null" if not self.path.exists() else str(self.path), str(self.path))
        after = self.content or ""
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *sides, lineterm="")
        return "\n".join(lines)

    def make(self) -> None:
        """Write in one piece: nobody reads half a file. OSError."""
        if self.content is None:
            self.path.unlink()
            return
        path = self.path.resolve()  # a link to a file elsewhere stays one
        path.parent.mkdir(parents=True, exist_ok=True)
        unready = path.with_name(path.name + ".unready")
        try:
            unready.write_text(self.content)
            unready.chmod(path.stat().st_mode & 0o7777 if path.exists() else self.mode)
            os.replace(unready, path)
        except OSError:
            unready.unlink(missing_ok=True)
            raise
