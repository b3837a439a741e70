"""The version of the plugin, and the version of the protocol of server and participants."""

__version__ = "0.7.0"

MOD_VERSION = 2
"""Version of the protocol between `flwr_colearn.participant_mod` and the server."""
