"""What operators need: drain, metrics, checks, logging and systemd."""
