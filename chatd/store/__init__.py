"""Where the rooms' logs are kept; each module is one way."""
