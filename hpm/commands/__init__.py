"""The command line (`cli.py`), and commands without a package of their own, one file each."""
