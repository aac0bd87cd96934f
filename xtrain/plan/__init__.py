"""What a training will need, before it starts: arithmetic alone, no torch."""
