"""Decoding speed and memory of one model, dense and packed: `acc bench` once per number of threads, in one file.

python tests/bench/decode.py MODEL PACKED... --out tests/bench/results/decode.json [--threads 1 2]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ACC = "import sys; sys.argv[0] = 'acc'; from acc.cli.main import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    found: dict = {"date": datetime.date.today().isoformat(), "memory_gib": memory, "runs": []}
    words = ["bench", *arguments.models, "--new-tokens", str(arguments.new_tokens), "--repeats", str(arguments.repeats)]
    packed = ["bench", arguments.models[-1], "--shapes", "--repeats", "5"]
    for threads in dict.fromkeys(arguments.threads):
        for command in ([*words, "--nf4"], packed):
            command = [*command, "--threads", str(threads), "--json"]
            done = subprocess.run([sys.executable, "-c", ACC, *command], stdout=subprocess.PIPE, text=True, check=True)
            found["runs"].append({"command": ["acc", *command], "load": os.getloadavg()[0], **json.loads(done.stdout)})
            text = json.dumps(found, indent=1)
            arguments.out.write_text(re.sub(r'"(/[\w.-]+)+/([\w.-]+)"', r'"\2"', text) + "\n")  # names, not places


if __name__ == "__main__":
    main()
