"""Kernels for the notebooks' tests, which need not import PyTorch (`tests.support.processes`)."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time

from jupyter_client.provisioning import local_provisioner

from tests.support import processes


def use_forks():
    """From now on `jupyter_client` starts the kernels of this process as forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return
    launch = local_provisioner.launch_kernel

    def launch_kernel(command, **options):
        ours = command[:2] == [sys.executable, "-m"]
        return Fork(command[2:], **options) if ours else launch(command, **options)

    local_provisioner.launch_kernel = launch_kernel


class Fork:
    """What `jupyter_client` asks of a subprocess.Popen, of a fork."""

    stdin = stdout = stderr = None

    def __init__(self, arguments, env=None, cwd=None, **options):
        self.process = processes.forks().Process(target=run, args=(arguments, env or dict(os.environ), cwd))
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
    """In the fork: become `python -m MODULE …`, with its own session, environment, directory and errors."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
