import sys

from hpm.commands.cli import main

sys.exit(main())
