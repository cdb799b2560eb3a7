"""Videos: sources, decoding, clips of them, and the built-in `demo-video`."""
