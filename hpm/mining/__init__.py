"""Which patches are hard, which are hidden, and how the student learns to tell."""
