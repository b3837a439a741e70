"""A Flower app whose participants train nothing, to measure a round's overhead."""
