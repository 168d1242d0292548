"""What a run of its own settings takes: seconds, memory, and where a step's time goes."""
