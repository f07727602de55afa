"""`python -m tests.torture`: the whole campaign, its counts as a table, and what repeats every defect.

Ends with 1 when there is a defect.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

from tests.torture import command, fuzz, inputs, kills, places, warm
from tests.torture.outcomes import Tally
from tests.torture.subjects import write_subjects

CAMPAIGNS = ("kills", "mutations", "fuzz", "places")


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    tally, begun = Tally(), time.monotonic()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        for campaign in options.only or CAMPAIGNS:
            _run(campaign, options, Path(folder), tally)
            print(f"{campaign}: done after {time.monotonic() - begun:.0f} s", flush=True)
    print(tally.table())
    for defect in tally.defects:
        print(f"\nDEFECT {defect}")
    return 1 if tally.defects else 0


def _run(campaign: str, options: argparse.Namespace, folder: Path, tally: Tally) -> None:
    work = folder / campaign
    work.mkdir()
    if campaign == "mutations":
        inputs.mutate_inputs(options.mutations, options.seed, tally, work, options.of or ())
        return
    if campaign == "fuzz":
        fuzz.fuzz_inputs(options.fuzzed, options.seed, tally, work)
        return
    recipes = write_subjects(work)
    os.environ[warm.PLANNED] = os.pathsep.join(map(str, recipes.values()))
    command.PROCESSES.set_forkserver_preload([warm.__name__, command.__name__])
    if campaign == "kills":
        kills.kill_runs(recipes, options.kills, options.seed, tally, work)
    else:
        counts = {name: round(count * options.places) for name, count in places.CASES.items()}
        places.obstruct(recipes, counts, options.seed, tally, work)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="where all chance comes from")
    parser.add_argument("--kills", type=int, default=240, help="runs that are killed (240)")
    parser.add_argument("--mutations", type=int, default=2400, help="damaged inputs (2400)")
    parser.add_argument("--fuzzed", type=int, default=20000, help="inputs of each kind that atheris makes (20000)")
    parser.add_argument("--of", action="append", metavar="WORD", help="damage only what has this in its name")
    parser.add_argument("--places", type=float, default=1.0, help="obstacles, as a part of the usual number (1)")
    parser.add_argument("--only", action="append", choices=CAMPAIGNS, help="this part alone; may be repeated")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
