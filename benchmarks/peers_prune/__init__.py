"""Published structured pruning, reimplemented as published to be measured beside ours; a file for each method.

Rows and columns that go are set to zero, which computes the same as without them, and counted as gone: a matrix holds
its rows that are not all zero times its columns that are not. The methods take decoders of the llama kind.
"""

from benchmarks.decoders import Peer
from benchmarks.peers_prune import flap, magnitude, modegpt, shortgpt, slicegpt, taylor

PEERS: dict[str, Peer] = {
    "magnitude": magnitude.PEER,
    "taylor": taylor.PEER,
    "shortgpt": shortgpt.PEER,
    "flap": flap.PEER,
    "modegpt": modegpt.PEER,
    "slicegpt": slicegpt.PEER,
}
