"""`python launcher.py PROCESSES ARGUMENTS`: start members, print how it ended, exit with its code."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from xtrain.launch import start_workers

ended = start_workers(sys.argv[2:], int(sys.argv[1]), os.environ, module="member")
print(json.dumps(asdict(ended)), flush=True)
sys.exit(ended.code)
