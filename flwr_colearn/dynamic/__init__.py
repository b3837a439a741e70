"""Model averaging in which models stay with the learners until they diverge."""
