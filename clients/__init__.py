"""Reference participants: they follow a LocalPlan with PyTorch models, on each site's own data."""
