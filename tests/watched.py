"""Runs `sedd` as its command line does, and writes down which examples each batch takes: watched.py FILE COMMAND ..."""

import importlib
import json
import os
import sys

from sedd import cli

batches = importlib.import_module("sedd.data.batches")  # of which the package has a function of that name
_read = batches.batch


def _watched(corpus, block_length, batch_size, seed, k, rows=None):
    taken = range(batch_size) if rows is None else rows.tolist()
    with open(f"{sys.argv[1]}.{os.getpid()}", "a") as file:
        file.write(json.dumps({"k": k, "examples": [k * batch_size + row for row in taken]}) + "\n")
    return _read(corpus, block_length, batch_size, seed, k, rows)


batches.batch = _watched
sys.exit(cli.main(sys.argv[2:]))
