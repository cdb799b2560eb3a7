"""How a training goes on: its state, schedule, optimiser, log."""
