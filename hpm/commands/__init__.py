"""Commands without a package of their own, one file each."""
