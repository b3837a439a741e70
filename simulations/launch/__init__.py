"""Starting Flower's own programs: its simulation, and a deployment."""
