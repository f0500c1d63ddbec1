"""``hedgerow-edge``: the daemon, or one line that says what it needs."""

import sys


def main() -> int:
    """Run the daemon; the process's exit code."""
    try:
        from hedgerow_edge import agent
    except ImportError as error:
        sys.exit(f"hedgerow-edge: {error.name} is not installed; pip install 'hedgerow[edge]' brings it")
    return agent.main()


if __name__ == "__main__":
    sys.exit(main())
