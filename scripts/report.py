"""Write the report of a run, or of several side by side, as one self-contained HTML page.

    python scripts/report.py runs/mine                     # writes runs/mine/report.html again
    python scripts/report.py runs/a runs/b runs/c --out three.html --open

A run is a directory that scripts/sdft.py finished. No model is needed. The figures need the extra
`report` (pip install -e '.[report]').
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
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="directory of a finished run of scripts/sdft.py",
    )
    help_text = (
        "page to write [default: report.html in the run; of several runs, in this directory]"
    )
    parser.add_argument("--out", type=Path, help=help_text)
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    report_job(args.runs, args.out, show=args.open)


if __name__ == "__main__":
    run_main(main, "run the same command again", kept="nothing was written")
