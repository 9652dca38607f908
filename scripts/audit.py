"""Show every function of this repository that one training step runs, line by line.

    python scripts/audit.py --out runs/audit                    # one optimizer step
    python scripts/audit.py --what distill --out runs/audit     # one distilled row
    python scripts/audit.py --ops triton --tiny --out runs/audit

Writes audit.html, one page that needs no network, and audit.txt. Ends with exit code 1 if the work
called autograd, unpickled, called a package that is not a core package, or ran a function that the
page does not show. Without a GPU, Triton kernels run in triton's interpreter (slow).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.jobs.audit import AuditConfig, audit_job, restart_interpreted
from engine.jobs.model_names import with_model_found
from engine.runtime.flags import InWords, add_flags, from_flags, make_parser, run_main
from engine.session import ModelConfig


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    model = InWords(None, "models/smollm2-135m-instruct if it is there, else as with --tiny")
    add_flags(parser, AuditConfig)
    add_flags(parser, ModelConfig, {"shard"}, model=model)
    help_text = "directory to write audit.html and audit.txt into"
    parser.add_argument("--out", type=Path, required=True, help=help_text)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    restart_interpreted(args.ops, args.device)
    config = from_flags(AuditConfig, args)
    model = with_model_found(from_flags(ModelConfig, args))
    violations = audit_job(config, model, args.out)
    if violations:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, "run the same command again", kept="nothing was written")
