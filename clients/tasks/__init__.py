"""The tasks: their data sets, and the registry from settings to shards and trainers."""
