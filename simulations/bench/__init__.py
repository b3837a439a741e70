"""Benchmarks: each measures its subject and its yardstick side by side, on the same machine."""
