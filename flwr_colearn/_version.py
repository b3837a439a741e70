"""The version of the plugin, and of what server and participants say to each other."""

__version__ = "0.5.0"

MOD_VERSION = 2
"""Version of what `flwr_colearn.participant_mod` and the server say to each other."""
