"""Started by the kill tests: forks one saving process per request, so that torch is imported only once.

Request on stdin: JSON [folder, stop, in_place]. Answers: the pid; "stopped" when it stopped itself; "gone" once dead.
stop: None saves until killed; a file name stops after that file is written; "rename" stops after the commit.
in_place: the negative control, which writes into the final folder.
"""

import json
import os
import signal
import sys

import torch

from ldm.checkpoints import files, store
from tests.checkpoints.states import state

NUMEL = 20_000


def stop_after(name: str) -> None:
    if name == "rename":
        files.replace_file = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # the next write after the commit
        return
    write = store._write

    def write_and_stop(path, content):
        entry = write(path, content)
        if path.name == name:
            os.kill(os.getpid(), signal.SIGSTOP)
        return entry

    store._write = write_and_stop


def save_until_killed(folder: str, stop: str | None, in_place: bool) -> None:
    if stop:
        stop_after(stop)
    if in_place:
        files.temporary = lambda path: path
    opened = store.Store(folder)
    opened.claim()
    step = max(opened.steps(), default=0)
    while True:
        step += 1
        opened.save(step, **state(step, NUMEL))


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            save_until_killed(*json.loads(line))
        print(pid, flush=True)
        while os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]):
            print("stopped", flush=True)
        print("gone", flush=True)


if __name__ == "__main__":
    main()
