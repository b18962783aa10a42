"""What several processes keep once between them instead of each for itself: moments, gradients, weights."""
