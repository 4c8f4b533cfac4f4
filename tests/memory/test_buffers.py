"""Memory that is used again."""

import json
import os
import subprocess
import sys

_COUNT = """
import json, resource, torch
from ggn_ntk.memory.buffers import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        first, second = torch.ones(3, 2**20), torch.ones(2, 2**20)
        del first, second
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed()
faults()
print(json.dumps([given_back, faults()]))
"""


def test_what_is_freed_is_used_again():
    # Dask sets thresholds of the allocator for its workers, and in its own process, too.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True, env=own)
    given_back, kept = json.loads(found.stdout)
    assert kept < given_back / 10
