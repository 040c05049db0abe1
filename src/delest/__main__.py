"""`python -m delest` is the command `delest`."""

from delest.cli import main

raise SystemExit(main())
