"""``python -m widthopt`` is the command ``widthopt``."""

import sys


# Python puts the current folder first for ``-m``. There a user's ``random.py`` or ``numpy.py``
# would stand in for the real one; `widthopt.cli.main` appends the folder instead.
if not sys.flags.safe_path:
    del sys.path[0]

from widthopt.cli import main


main()
