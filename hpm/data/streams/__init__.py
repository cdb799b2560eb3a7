"""Data that is read in order: shards on a disk, a web server or an object store."""
