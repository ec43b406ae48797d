"""The FUSE protocol without I/O: requests in, replies out. Floor 1: imports nothing but `overt.wire`."""
