"""The terminal chat, `python -m chatd.client`: the conversation, and posting and reading in pipes."""
