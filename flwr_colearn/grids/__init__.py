"""Flower Grids: around another grid, and in one process."""
