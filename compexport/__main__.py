"""``python -m compexport`` and the ``compexport`` script."""

from compexport.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
