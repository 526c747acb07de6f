"""Runs a command as several processes of one run on this machine.

python launch/cluster.py 2 -- python -m navit_jax.train --config=configs/smoke.py \\
    --workdir=runs/two --config.data.rows=8

Each line is printed behind the number of its process. SIGINT, SIGTERM and SIGHUP are
passed on to all; to stop one alone, signal its pid, which is printed. When one fails
(42, a run that was told to stop and saved, is no failure), the others have --grace
seconds to notice and leave; then they are killed. The exit code is that of one that
failed, of several not that of those that lost another (44), and 0 if none did.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

# As navit_jax/errors.py has them.
PREEMPTED, LOST_PEER = 42, 44


def start(
    processes: list[subprocess.Popen[str]], command: list[str], count: int, devices: int
) -> None:
    """Adds processes; each has so many CPU devices, 0 for what there is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "PYTHONUNBUFFERED": "1",
    }
    if devices:
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={devices}"
        )
    for index in range(count):
        process = subprocess.Popen(
            command,
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # So that a key pressed in the terminal comes from here alone.
            start_new_session=True,
        )
        processes.append(process)


def pass_lines(index: int, process: subprocess.Popen[str]) -> None:
    """Prints what a process says, behind its number."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def wait(processes: list[subprocess.Popen[str]], grace: float) -> int:
    """Waits for all; kills those that outlive one that failed by `grace` seconds.

    Returns:
      The exit code, as a shell has it.
    """
    left: dict[int, int] = {}
    deadline = float("inf")
    while len(left) < len(processes):
        time.sleep(0.1)
        for index, process in enumerate(processes):
            code = process.poll()
            if code is None:
                if time.monotonic() > deadline:
                    print(f"process {index} is still there: killed", flush=True)
                    # With what it started; it leads a group of its own.
                    os.killpg(process.pid, signal.SIGKILL)
                    left[index] = LOST_PEER
                continue
            if index not in left:
                left[index] = 128 - code if code < 0 else code
                print(f"process {index} left with {left[index]}", flush=True)
                if code not in (0, PREEMPTED):
                    deadline = min(deadline, time.monotonic() + grace)
    failed = sorted((code for code in left.values() if code), key=LOST_PEER.__eq__)
    return failed[0] if failed else 0


def main() -> int:
    """Reads the arguments, runs the processes, returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, help="processes")
    parser.add_argument(
        "--devices", type=int, default=4, help="CPU devices of each; 0: what there is"
    )
    # More than the 100 s after which JAX finds that a silent process is lost.
    parser.add_argument("--grace", type=float, default=120.0, help="seconds")
    parser.add_argument("command", nargs="+", help="behind --")
    given = parser.parse_args()
    if given.count < 1:
        parser.error(f"count {given.count}: give 1 or more")
    processes: list[subprocess.Popen[str]] = []

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    start(processes, given.command, given.count, given.devices)
    printers = [
        threading.Thread(target=pass_lines, args=each, daemon=True)
        for each in enumerate(processes)
    ]
    for index, process in enumerate(processes):
        print(f"process {index} of {given.count}: pid {process.pid}", flush=True)
        printers[index].start()
    code = wait(processes, given.grace)
    for printer in printers:
        printer.join(timeout=5)
    return code


if __name__ == "__main__":
    sys.exit(main())
