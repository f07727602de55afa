"""Packages that quantise, each run by a script beside this file in an environment of its own under out/.

An environment is made with pip when it is missing. A script gets the same checkpoint and the same calibration windows
as all methods of a benchmark (`outside.Job`), and writes a checkpoint that transformers loads: packed, where our
environment reads the package's format, else with the values that its codes stand for. It says how many bits a weight
its own format takes. Costs are those of the whole process, as ours are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import PEER, PEERS, Finished, peer_python, run
from benchmarks.peers_quantize.outside import Job

HERE = Path(__file__).resolve().parent
HQQ = ("hqq==0.2.8.post1", "torch==2.13.0")
AUTO_ROUND = ("auto-round==0.16.1", "torch==2.13.0")


@dataclass(frozen=True)
class Package:
    """``script`` runs ``method`` of what ``requirements`` install in ``environment``."""

    script: str
    method: str
    requirements: tuple[str, ...]
    environment: Path
    symmetric: tuple[bool, ...] = (True,)

    def run(self, job: Job) -> tuple[float, Finished]:
        """The bits a weight of what it wrote, and what that took."""
        python = peer_python(self.requirements, self.environment)
        given = json.dumps({**asdict(job), "method": self.method})
        threads = str(job.threads)
        done = run([str(python), str(HERE / self.script), given], OMP_NUM_THREADS=threads)
        return json.loads(done.output.splitlines()[-1])["bits"], done


PACKAGES: Mapping[str, Package] = {
    "llm-compressor gptq": Package("llm_compressor.py", "gptq", tuple(PEER), PEERS),
    "hqq": Package("hqq_.py", "hqq", HQQ, PEERS.with_name("peers-hqq"), symmetric=(False,)),
    "auto-round light": Package("auto_round_.py", "light", AUTO_ROUND, PEERS.with_name("peers-auto-round")),
}
