"""Kernels for the notebooks' tests, forked from a process that has imported what all of them import.

PyTorch, torchvision and seaborn take seven seconds of every kernel. Here a server of `multiprocessing`
imports them once, and a kernel is a fork of it, in which those imports are done at once. The notebooks' own
code is read anew by each.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time

from jupyter_client.provisioning import local_provisioner

# The last is what the first optimizer imports. What keeps a thread, or reads settings, is left to the kernel.
IMPORTS = ["torch", "torchvision", "seaborn", "torch._dynamo", "ipykernel.kernelapp"]


def use_forks():
    """From now on `jupyter_client` starts the kernels of this process as forks."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(IMPORTS)
        local_provisioner.launch_kernel = lambda command, **options: Fork(forks, command, **options)


class Fork:
    """What `jupyter_client` asks of a subprocess.Popen, of a fork."""

    stdin = stdout = stderr = None

    def __init__(self, forks, command, env=None, cwd=None, **options):
        self.process = forks.Process(target=run, args=(command[1:], env or dict(os.environ), cwd))
        self.process.start()
        self.pid = self.process.pid
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.01)  # until it leads a group of its own: the whole group is interrupted and killed

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("kernel", timeout)
        return self.process.exitcode

    def send_signal(self, signum):
        if self.process.exitcode is None:
            os.kill(self.pid, signum)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(arguments, env, cwd):
    """In the fork: become `python -m module …`, with its own session, environment and directory."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    flag, module, *rest = arguments
    while flag != "-m":
        flag, module, *rest = module, *rest
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
