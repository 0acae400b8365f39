"""Models of other programs: read and written under one set of names."""
