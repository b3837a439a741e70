"""The server of the Flower app, run configs, the demo, the studies and the benchmarks."""
