"""A stage of test_scale in a process of its own, also under `accelerate launch`.

python stage_worker.py HOME STAGE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_scale import go  # noqa: E402

if __name__ == "__main__":
    home, stage, out = sys.argv[1:]
    go(Path(home), stage, Path(out))
