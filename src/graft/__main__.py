"""`python -m graft` is the same program as the `graft` command."""

from graft.studio.cli import main

raise SystemExit(main())
