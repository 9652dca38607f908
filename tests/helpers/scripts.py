"""Running the scripts as a person does, and small files of rows for them."""

import json
import sys
from pathlib import Path

from tests.helpers import programs

ROOT = Path(__file__).resolve().parents[2]


def run_script(name, *args, code=0):
    """Run scripts/NAME.py from another directory; returns what it printed."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, args)]
    done = programs.run(command, cwd="/")
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + (done.stderr if code else "")


def write_word_problems(folder, train=8, test=4):
    """Write train.json and test.json with that many rows; returns the folder."""
    for name, first, count in (("train", 1, train), ("test", 50, test)):
        rows = []
        for i in range(first, first + count):
            rows.append({"question": f"What is {i} plus {i}?", "answer": f"The answer is {2 * i}."})
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder
