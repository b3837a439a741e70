"""Participants that fail are restarted in the same round, or left out by a stated policy."""
