"""What everything rests on: options, errors, files, processes."""
