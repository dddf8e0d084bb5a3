"""Attention over the paged pool: one interface, one reference, and fast backends beside it."""
