"""Mining: which patches are hard, which are hidden, and the losses that teach it."""
