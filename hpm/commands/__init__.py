"""One file for each verb of the command line that has no folder of its own."""
