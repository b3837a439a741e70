"""Participants in TF-slim."""
