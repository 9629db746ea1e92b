"""`python -m chatd.load URL`: prove, under load, that a server loses nothing."""
