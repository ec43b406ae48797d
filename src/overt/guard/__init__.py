"""A seccomp agent that answers syncfs(2) for stock containers on the kernel's own overlayfs."""
