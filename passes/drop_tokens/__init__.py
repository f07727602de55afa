"""Going on with fewer tokens from some layers on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compiler.errors import PassError
from compiler.ir.graph import Graph
from compiler.pipeline import Context, Pass

Part = Annotated[float, Field(gt=0, le=1)]
Number = Annotated[int, Field(ge=1)]
End = Annotated[int, Field(ge=0)]
Score = Literal[
    "class", "received", "last", "key-norm", "change", "similarity", "random", "recency", "earliest", "learned"
]


@dataclass(frozen=True)
class DropTokens(Pass):
    """Go on with fewer tokens behind some layers; ``keep`` of them, a part or a number, remain behind the last.

    ``layers`` (`3,6-8`; all without it) of the first ``stack`` whose tokens attend to each other, or of the one with
    this name in its path, each drop alike many; a list for ``keep`` says what remains behind each. They do so behind
    their attention, behind the whole `layer`, or at its `entry` (``site``). ``score`` says which remain: those that the
    first token (`class`), the `last` one (of causal models, without ``score``) or all queries, or every ``every``-th,
    attend to most (`received`, of others without); with the smallest keys (`key-norm`); moved farthest by their layer
    (`change`: others halt, arXiv 2506.22396); least like others (`similarity`, by keys); the `earliest` (D3, arXiv
    2503.08524); by that attention and a small gate trained on ``learn`` tokens of calibration data (`learned`), so that
    outputs, or the ``means`` ``of`` them over tokens, are the original's; or, to compare, `random` (by ``seed``) or
    `recency`. The first ``prefix`` tokens and the last ``suffix`` remain: without a number those that the model learnt;
    of texts the first, and of causal models the last. Tokens stay or go in runs of ``block`` neighbours, by the mean of
    their scores (SlimInfer, arXiv 2508.06447); of the last run a part may stay.

    ``merge: bipartite`` makes each dropped token part of the mean with the one that it is most like by its keys, or in
    the `stream` (``compare``), with attention as if it were still there (ToMe, arXiv 2210.09461; ``proportional``);
    `extra` makes one token of all that a layer drops, by score (EViT, arXiv 2202.07800); `average` makes means of
    neighbours, and `words` of patches of a picture that are the same word of a vocabulary, found in ``learn`` tokens of
    calibration data (arXiv 2411.15397), whatever the score. Rotary and other ``positions`` stay with their tokens, or
    are counted anew (`renumber`).

    Behind the last layer every token has its place again: a dropped one as it was then, a merged one as what it became.
    With ``tokens: pictures`` only those of pictures in a text can go, and ``keep`` counts these (FastV, PyramidDrop);
    `class` is then what the class tokens of pictures attend to. Where those of a text are one and its ``crops``, rows
    and columns of them, each has a part of ``keep`` by what that one attends to (GlobalCom2, arXiv 2501.05179).
    With ``skip: mlp`` those that do not remain skip only that layer's MLP; ``keep`` is then what each MLP sees.
    Exact with ``keep: 100%``.
    """

    layers: str | None = None
    stack: str | None = None
    tokens: Literal["all", "pictures"] = "all"
    site: Literal["attention", "layer", "entry"] = "attention"
    skip: Literal["layers", "mlp"] = "layers"
    score: Score | None = None
    keep: Part | Number | tuple[Part | Number, ...] = 1.0
    merge: Literal["none", "extra", "bipartite", "average", "words"] = "none"
    compare: Literal["keys", "stream"] = "keys"
    proportional: bool = True
    positions: Literal["keep", "renumber"] = "keep"
    prefix: End | None = None
    suffix: End | None = None
    every: Number = 1
    block: Number = 1
    crops: tuple[Number, ...] = ()
    seed: End = 0
    learn: Number = 65536
    of: Literal["tokens", "means"] = "tokens"

    exact_when: ClassVar = {"keep": 1.0}
    edits_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.merge == "bipartite" and self.score not in (None, "similarity"):
            raise PassError(
                "`merge: bipartite` takes pairs that are alike",
                option="score",
                remedy="leave out `score`, or write `score: similarity`",
            )
        if self.merge == "extra" and self.score not in (None, "class", "received", "last"):
            raise PassError(
                "`merge: extra` weighs tokens by attention",
                option="score",
                remedy="write `score: class`, `received` or `last`",
            )
        if self.merge in ("average", "words") and self.score is not None:
            merged = "neighbours" if self.merge == "average" else "tokens of a word"
            cause = f"`merge: {self.merge}` merges {merged}, whatever the score"
            raise PassError(cause, option="score", remedy="leave out `score`, or write `merge: none`")
        if self.tokens == "pictures" and (self.merge != "none" or self.alike):
            cause = "of pictures in a text, tokens are dropped by score"
            raise PassError(cause, option="tokens", remedy="leave out `merge`, and `score: similarity`")
        if self.site == "entry" and not self._known_at_entry:
            cause = "before a layer its attention is not known"
            remedy = "score by place, by what class tokens of `pictures` attend to, or compare the `stream`"
            raise PassError(cause, option="site", remedy=remedy)
        if len(self.crops) not in (0, 2):
            raise PassError("crops are rows and columns", option="crops", remedy="write two numbers, as [2, 2]")
        if self.skip == "mlp" and (self.site, self.positions) != ("attention", "keep"):
            cause = "tokens that skip an MLP alone do so behind attention, and keep their positions"
            raise PassError(cause, option="skip", remedy="leave out `site` and `positions`")
        if self.skip == "mlp" and self.merge == "extra":
            cause = "what an MLP adds to a token more than there are has no place"
            raise PassError(cause, option="merge", remedy="write `merge: bipartite`, or leave it out")
        if self.score == "learned" and (self.tokens, self.skip) != ("all", "layers"):
            cause = "a gate is trained for tokens of all kinds, which leave layers"
            raise PassError(cause, option="score", remedy="leave out `tokens` and `skip`")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """Raises PassError for an option that differs from its default where nothing reads it."""
        weighed = self.skip == "layers" and self.merge in ("bipartite", "average", "words")
        received = self.score in (None, "received") and self.merge in ("none", "extra")
        words = self.merge == "words"
        random = words or self.score in ("random", "learned")
        scored = self.merge in ("none", "extra") and self.score != "similarity"
        for option, read, when in (
            ("compare", self.alike or words, "tokens are matched, as by `merge: bipartite` or `score: similarity`"),
            (
                "proportional",
                weighed,
                "attention sees means, of `merge: bipartite`, `average` or `words` behind layers",
            ),
            ("every", received, "queries are counted, by `score: received`"),
            ("block", scored, "tokens are dropped by score"),
            ("crops", self.shown, "class tokens of `pictures` say what remains, by `score: class`"),
            ("seed", random, "something is drawn, by `score: random` or `learned`, or `merge: words`"),
            ("learn", words or self.score == "learned", "something is learned, by `score: learned` or `merge: words`"),
            ("of", self.score == "learned", "a gate is trained, by `score: learned`"),
        ):
            if not read and getattr(self, option) != getattr(DropTokens, option):
                raise PassError(f"`{option}` is read only where {when}", option=option, remedy=f"leave out `{option}`")

    @property
    def calibrated(self) -> bool:
        """Whether a gate is trained, or words are found."""
        return (self.score == "learned" or self.merge == "words") and not self.exact

    @property
    def exact(self) -> bool:
        """Whether every token remains. One token, `keep: 1`, is not the whole, `keep: 100%`."""
        return isinstance(self.keep, float) and self.keep == 1.0

    @property
    def shown(self) -> bool:
        """Whether tokens of pictures in a text go by what the class tokens of these attend to."""
        return self.tokens == "pictures" and self.score == "class"

    @property
    def by_place(self) -> bool:
        """Whether scores say where a token stands alone."""
        return self.score in ("random", "recency", "earliest")

    @property
    def _known_at_entry(self) -> bool:
        """Whether what remains can be said before a layer has attended."""
        if self.alike or self.merge == "words":
            return self.compare == "stream"
        return self.shown or self.merge == "average" or self.by_place

    @property
    def alike(self) -> bool:
        """Whether tokens are dropped by how like others they are."""
        return self.merge == "bipartite" or (self.merge == "none" and self.score == "similarity")

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when there are no such layers, or something between them needs every token."""
        if self.exact:
            return
        from passes.drop_tokens.reduce import reduce

        reduce(graph, ctx, self)
