"""How good answers are: every metric, defined once, for `eval` and for validation in a run."""
