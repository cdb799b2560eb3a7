"""What `hpm ablate` compares (plan), and how the numbers are shown (results)."""
