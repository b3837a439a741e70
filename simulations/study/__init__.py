"""The study of the paper's arms, and the studies with commands of their own."""
