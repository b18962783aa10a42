"""What a run shows while it trains: its numbers, said once, and where they go."""
