"""`python launcher.py PROCESSES ARGUMENTS`: start members, print how it ended, exit with its code.

RESTARTS in the environment: how often they are started again.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from xtrain.launching.launch import start_workers

restarts = int(os.environ.get("RESTARTS", "0"))
ended = start_workers(sys.argv[2:], int(sys.argv[1]), os.environ, module="member", max_restarts=restarts)
print(json.dumps(asdict(ended)), flush=True)
sys.exit(ended.code)
