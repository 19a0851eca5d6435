"""`python timed.py WORDS`: `kd WORDS`, and on stdout how long its training took, and each save in it (seconds)."""

from __future__ import annotations

import json
import sys

import variants

from kdcli.__main__ import run

variants.timed_saves()
code = run(sys.argv[1:])
print(json.dumps(variants.TIMED))
sys.exit(code)
