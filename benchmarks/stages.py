"""Where the time and memory of ``jrs infer`` go: the whole process, several times, medians.

    python benchmarks/stages.py examples/TCGA-DU-7294 --runs 3 [-- further options of jrs infer]

Wall and CPU seconds and peak memory are the process's own (imports, reading and writing included); the stages are
those of its report. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_LAUNCHER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
WALL, CPU, PEAK = "whole process, wall", "whole process, CPU", "peak memory, GB"


def run_once(case: str, options: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """One process: its stages, wall and CPU seconds, peak memory in GB."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "jrs", "infer", case, "--out", out, *options]
        # By way of a small process: a child's peak memory begins with that of the process it was forked from.
        done = subprocess.run(
            [sys.executable, "-c", _LAUNCHER, *command],
            capture_output=True,
            text=True,
            env={**os.environ, **(environment or {})},
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed; run it by hand to see why")
        wall, cpu, largest = (float(value) for value in done.stdout.split())
        report = json.loads(next(Path(out).rglob("*_report.json")).read_text(encoding="utf-8"))
    stages = {name: value for name, value in report["timings_s"].items() if name != "total"}
    peak = largest / (1e9 if sys.platform == "darwin" else 1e6)
    return {**stages, WALL: wall, CPU: cpu, PEAK: peak}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("--runs", type=int, default=3)
    known, options = parser.parse_known_args()
    rows = [run_once(known.case, [o for o in options if o != "--"]) for _ in range(known.runs)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, medians of {known.runs} runs\n")
    print("| stage | seconds |\n|---|---|")
    for name in rows[0]:
        print(f"| {name} | {statistics.median(row[name] for row in rows):.2f} |")


if __name__ == "__main__":
    main()
