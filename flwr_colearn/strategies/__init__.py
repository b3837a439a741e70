"""Strategies in which every participant sends its model every round."""
