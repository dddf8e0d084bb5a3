"""Where KV entries live: the pool's tensors, who owns which page, slot arithmetic, reuse by content."""
