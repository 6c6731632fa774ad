"""A rank that closes its pipe without a word and ends a little later."""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":
    os.close(int(sys.argv[2]))
    time.sleep(0.3)
    sys.exit(1)
