"""A Flower app whose rounds are all overhead."""
