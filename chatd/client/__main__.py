"""The command line of `python -m chatd.client`: a chat in a terminal or a pipe."""

import sys

from chatd.client.terminal.program import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
