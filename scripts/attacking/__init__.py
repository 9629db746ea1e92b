"""The parts of scripts/fuzz and scripts/soak: servers under attack, the attacks, and clients that behave."""
