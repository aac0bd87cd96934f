"""What a run leaves behind, and what it tells while it goes: metrics, record, run directory, summary."""
