"""The benchmarks: each measures its subject and a baseline in turn, on the same machine."""
