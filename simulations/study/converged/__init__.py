"""The study at convergence: variants of training, until their curves are flat."""
