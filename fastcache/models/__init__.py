"""Model files: one architecture each, the layers they share, and how weights get into them."""
