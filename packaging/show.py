"""Run pip and show what it is at, a line at least every five seconds: ``python packaging/show.py install ...``.

By itself pip prints either nothing for minutes or hundreds of lines. This shows what is fetched, installed and
compiled, and everything if it fails.
"""

import os
import queue
import re
import subprocess
import sys
import threading
import time

TELLING = re.compile(r"(Collecting|Downloading|Installing collected|Successfully installed|deformkit:|ERROR)")
# Less than the five seconds, for a machine that is busy.
SECONDS = 4.0
LONGEST = 120


def main(arguments: list[str]) -> int:
    """Run ``pip`` with ``arguments``; its exit status."""
    # Verbose, pip hands on what the build backend prints.
    environment = {**os.environ, "PIP_VERBOSE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    everything, start, spoken = [], time.time(), time.time()
    while True:
        try:
            line = lines.get(timeout=max(0.0, spoken + SECONDS - time.time()))
        except queue.Empty:
            line = f"  pip is at work, {time.time() - start:.0f} s"
        else:
            if line is None:
                break
            everything.append(line)
            if not TELLING.match(line.strip()):
                if time.time() < spoken + SECONDS:
                    continue
                line = f"  pip is at work, {time.time() - start:.0f} s"
        spoken = time.time()
        print(line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}...", flush=True)
    status = process.wait()
    if status:
        print("\n".join(everything))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
