"""A job whose store is in a process that has been stopped: it takes connections and answers nothing."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

from tests.forked import run_python, start_python

_SERVER = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True)
print(store.port, flush=True)
time.sleep(1000)
"""
_RANK = """
import os, sys, time
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # ranks without connections among each other
from tests.ground.stopped_process import stop_process
port, server = map(int, sys.argv[1:])
store = dist.TCPStore("127.0.0.1", port, is_master=False)
dist.init_process_group("fake", store=store, rank=0, world_size=2)

def stop_store():
    stop_process(server)

"""


def run_beside_stopped_store(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script as rank 0 of 2; it calls ``stop_store()`` itself."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "port")
        told.touch()
        server = start_python("-c", _SERVER, output=told)
        try:
            while not (port := told.read_text()).endswith("\n"):
                assert server.is_alive()
                time.sleep(0.01)
            return run_python("-c", _RANK + script, port.strip(), str(server.pid))
        finally:
            server.kill()
            server.join()
