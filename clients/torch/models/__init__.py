"""PyTorch networks for the tasks."""
