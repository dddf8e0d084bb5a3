"""Quality cells: what a compressed context still knows, measured through the engine beside its speed."""
