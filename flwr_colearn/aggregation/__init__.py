"""How replies become one model: what a reply must be, the mean, pooled statistics, distances."""
