"""What a run costs: time by phase, memory by category, operations, and the machine it is on."""
