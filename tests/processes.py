"""Work that is done by two processes: a test module that runs as their program, and what each of them found."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState

SECONDS = 900  # processes that wait for each other do so for ever


def start_one_of_two() -> PartialState:
    """Become one of the two processes."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    return state


def finish(state, results, folder):
    """Write the results of one of the processes to a file, and end it."""
    torch.save(results, Path(folder) / f"{state.process_index}.pt")
    state.wait_for_everyone()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)  # threads of torch.distributed can abort an interpreter that has done its work and ends


def launched(module, folder, *paths):
    """The results of a test module's `main(folder)` in each of two processes.

    Args:
        module: path of the module.
        folder: for its results.
        paths: more folders to import from.
    """
    run_by_two(module, folder, paths=paths)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def run_by_two(*arguments, paths=()):
    """Run what `torchrun` runs, in two processes, to its end; what it printed.

    Args:
        arguments: path of a program, or `-m` and a module, and its arguments.
        paths: more folders to import from.
    """
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
