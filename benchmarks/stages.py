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
import time
from pathlib import Path


def run_once(case: str, options: list[str]) -> dict[str, float]:
    """One process: its stages, wall and CPU seconds, peak memory in GB."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", "from jrs.cli.main import main; main()", "infer", case, "--out", out, *options]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) != 0:
            raise SystemExit(f"{' '.join(command)} failed; run it by hand to see why")
        report = json.loads(next(Path(out).rglob("*_report.json")).read_text(encoding="utf-8"))
    stages = {name: value for name, value in report["timings_s"].items() if name != "total"}
    peak = usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    cpu = usage.ru_utime + usage.ru_stime
    return {**stages, "whole process, wall": wall, "whole process, CPU": cpu, "peak memory, GB": peak}


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
