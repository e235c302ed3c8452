"""Files on the disk: opened safely, read in part, locked, and published whole."""
