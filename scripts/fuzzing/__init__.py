"""The parts of scripts/fuzz: what it sends, and what a server may answer."""
