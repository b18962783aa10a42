"""One training: data, the loop, optimizer, gradients, state, metrics, report."""
