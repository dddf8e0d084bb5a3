"""Seeded pictures of coloured shapes on a grid, questions about them, and their exact answers."""
