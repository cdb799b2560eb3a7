import sys

from hpm.cli import main

sys.exit(main())
