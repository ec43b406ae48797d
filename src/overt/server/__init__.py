"""One process, many mounts: the loop, the workers, mounting and unmounting."""
