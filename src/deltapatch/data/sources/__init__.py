"""The places that labelled images are read from, one file per kind, all into one common ``Source``."""
