import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents import runs
from tests.agents.resuming import DIGITS, NET, ROLLOUTS

ROOT = Path(__file__).parents[2]

TRAINING = """
import sys
from pathlib import Path
from agents.jobs import Job, run_jobs
root, *words = sys.argv[1:]
run_jobs([Job(Path(root), (*words, "--log-folder", root), 1)], 1)
"""
SLEEPING = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
from concurrent.futures import ThreadPoolExecutor
from agents.children import Children
from agents.command_line import reported
def wait():
    with ThreadPoolExecutor(2) as pool, Children() as children:
        ends = [pool.submit(children.run, ["sleep", "600"]) for _ in range(3)]
        while not all(end.done() for end in ends):
            children.rest(1.0)
sys.exit(reported(wait))
"""
POOL = """
import os
from agents.children import processes
if __name__ == "__main__":
    pool = processes(1)
    print(pool.submit(os.getpid).result(), flush=True)
    input()
"""


def started(script, *words):
    return subprocess.Popen([sys.executable, "-c", script, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def children_of(pid):
    return [int(n) for task in Path(f"/proc/{pid}/task").glob("*/children") for n in task.read_text().split()]


def runs_still(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(happened, seconds=120.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(pids):
    """Wait until none is left; whoever is left in the end is not left to the machine."""
    try:
        until(lambda: not any(map(runs_still, pids)))
    finally:
        for pid in filter(runs_still, pids):
            os.kill(pid, signal.SIGKILL)


def test_a_run_whose_parent_is_killed_saves_and_ends(tmp_path):
    words = [*DIGITS, *NET, *ROLLOUTS, "-n", "100000000", "--save-minutes", "0"]
    parent = started(TRAINING, str(tmp_path), *words)
    until(lambda: any(path.stat().st_size > 100 for path in tmp_path.rglob("episodes.csv")))
    pids = children_of(parent.pid)
    parent.kill()
    parent.wait()
    assert len(pids) == 1
    ended(pids)
    (folder,) = (path.parent for path in tmp_path.rglob("config.yaml"))
    assert len(list(folder.glob("checkpoints/*.zip"))) == 1 and not runs.finished(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_parent_that_is_asked_to_end_ends_its_children_first(number, code):
    parent = started(SLEEPING)
    until(lambda: len(children_of(parent.pid)) == 2)
    pids = children_of(parent.pid)
    parent.send_signal(number)
    assert parent.wait(60) == code  # and so the third was not begun
    assert not any(map(runs_still, pids))
    assert parent.stderr.read() == f"{number.name}: asked all runs to end; the same command goes on with them\n"


def test_a_pools_process_whose_parent_is_killed_ends(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    found = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script)], env=found, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    pids = children_of(parent.pid)
    assert worker in pids
    parent.kill()
    parent.wait()
    ended(pids)
