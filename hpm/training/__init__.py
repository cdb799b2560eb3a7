"""Training: state, schedules, optimiser, logging, resuming."""
