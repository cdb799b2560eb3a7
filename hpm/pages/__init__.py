"""Pages to open in a browser: the report of a run, the gallery of `hpm show`, and `hpm view`."""
