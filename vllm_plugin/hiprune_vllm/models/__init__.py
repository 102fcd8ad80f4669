"""What is a model family's own, an adapter each, and the algorithm that all of them share."""
