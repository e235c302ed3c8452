from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROCESS = """
from sdpnet.distributed import join, least, leave

processes = join("cpu")
print(f"<{least([48, 12][processes.shard.rank], processes)}>", flush=True)
leave()
"""


def test_the_least_of_all_processes(tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("<12>") == 2
