"""Operation of the server: drain, metrics, checks, logging and systemd."""
