"""The start of Flower's programs, for a simulation and for a deployment."""
