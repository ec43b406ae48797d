"""Linux 5.10: the upper is flushed, and what it has to say is not heard."""

from overt.prove.design import Answer, Design
from overt.prove.world import File, Party, Upper


class Linux510(Design):
    """`ovl_sync_fs` has the upper flushed; nothing sets the overlay's own cursor, and syncfs(2) drops what ->sync_fs
    returns. A volatile mount does neither (c86243b090bc)."""

    name = "linux-5.10"
    title = "Linux 5.10"
    source = "v5.10, fs/overlayfs/super.c, ovl_sync_fs"

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if not overlay.volatile:
            self.flush(upper)
        return Answer(self.advance_own(overlay, file), not overlay.volatile)
