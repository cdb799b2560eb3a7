"""Image sources, transforms and loading."""
