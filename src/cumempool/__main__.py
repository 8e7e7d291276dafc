"""``python -m cumempool``."""

from cumempool.tools.cli import main

if __name__ == "__main__":
    main()
