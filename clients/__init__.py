"""Reference participants: they follow a LocalPlan with PyTorch, Keras or TF-slim, on local data."""
