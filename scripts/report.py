"""The report of a run, or of several side by side, as one HTML page that asks for nothing else.

    python scripts/report.py runs/mine                     # writes runs/mine/report.html again
    python scripts/report.py runs/a runs/b runs/c --out three.html --open

Runs are directories that scripts/sdft.py finished. Needs no model. Figures need the extra `report`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.report.page import report_job
from engine.runtime.flags import make_parser, run_main


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    help_text = "the page (default: report.html in the run; of several runs, here)"
    parser.add_argument("--out", type=Path, help=help_text)
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    report_job(args.runs, args.out, show=args.open)


if __name__ == "__main__":
    run_main(main, "the same command begins again", kept="nothing was written")
