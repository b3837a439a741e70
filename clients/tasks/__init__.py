"""The tasks: real data, its partition over participants, and the models that learn it."""
