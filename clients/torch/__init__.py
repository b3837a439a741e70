"""Participants in PyTorch."""
