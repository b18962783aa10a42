"""From a model's folder to answers: load, generate, score."""
