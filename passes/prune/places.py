"""Places: groups of the graph that can be pruned, of which kind, and who reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from compiler.calibration.products import matrix_shape, products
from compiler.errors import PassError
from compiler.ir.coupling import CouplingGroup, Member, coupling_groups
from compiler.ir.facts import expert_sites
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.roles import has_role, roles
from compiler.pipeline import Context
from compiler.rewrite.stream import residual


@dataclass(frozen=True, eq=False)
class Place:
    """``size`` indices of one kind that can be removed. ``groups`` are coupled by number (experts and their router).

    ``readers`` are the products that read the axis, which can make up for what is gone. ``outer`` is the group right
    above, within whose indices those of this place may change their order (the key/value heads of query heads).
    ``least`` is how many must remain.
    """

    kind: str
    groups: tuple[CouplingGroup, ...]
    readers: tuple[Member, ...]
    outer: CouplingGroup | None = None
    least: int = 1

    @property
    def size(self) -> int:
        return self.groups[0].size

    @property
    def group(self) -> CouplingGroup:
        return self.groups[0]

    @cached_property
    def params(self) -> dict[Param, int]:
        """Every matrix that loses by it, with the numbers that one index of it holds."""
        members = (m for g in self.groups for m in g.members if _is_matrix(m.param) or self.kind == "hidden")
        return {m.param: m.param.type.numel // self.size for m in members}

    @property
    def cost(self) -> int:
        """The numbers of all matrices that one index holds; routers do not count."""
        own = {member.param for member in self.group.members}
        return sum(numbers for param, numbers in self.params.items() if param in own)

    @property
    def key(self) -> tuple[object, ...]:
        """The same for the same place of a copy of the graph."""
        return self.kind, self.size, sorted((m.param.name, m.axis, m.stride) for g in self.groups for m in g.members)

    @property
    def name(self) -> str:
        """The module of the first reader, or of the first member; of a stream, that of what starts it."""
        if self.kind == "hidden":
            params = [member.param for member in self.group.members]
            return next((scope for param in params if (scope := _starting(param))), "")
        member = self.readers[0] if self.readers else self.group.members[0]
        return next(iter(member.param.users)).scope

    def columns(self, reader: Member) -> list[list[int]]:
        """For every index the columns of the reader's matrix that belong to it."""
        _, _, width = matrix_shape(reader.param)
        shape = reader.param.type.static_shape
        window = width // shape[reader.axis]  # of a convolution
        found: list[list[int]] = [[] for _ in range(self.size)]
        for position in range(shape[reader.axis]):
            index = position // reader.stride % self.size
            found[index] += range(position * window, (position + 1) * window)
        return found


def _starting(param: Param) -> str:
    """The module of an embedding or a convolution of ``param``."""
    return next((node.scope for node in param.users if node.op.name in ("embedding", "conv")), "")


def places_of(graph: Graph, ctx: Context, kinds: Sequence[str], params: Sequence[Param]) -> list[Place]:
    """The places of ``kinds`` of which all matrices are among ``params``. Others are reported with the reason.

    Raises PassError, with a reason, when there is none.
    """
    known, chosen = roles(graph), set(params)
    groups = coupling_groups(graph)
    found: list[Place] = []
    refused: dict[str, str] = {}
    for place in _candidates(graph, groups, known, kinds):
        reason = _refusal(place, chosen)
        if reason:
            refused[place.name] = reason
        else:
            found.append(place)
    _check_apart(found)
    if not found and not {"layers", "sublayers"} & set(kinds):
        first = next((f"{name}: {reason}" for name, reason in refused.items()), "the model has none")
        raise PassError(
            f"nothing to prune of {', '.join(kinds)}; {first}", option="what", remedy="name other kinds in `what`"
        )
    for name, reason in refused.items():
        ctx.skipped(name, reason)
    return found


def _check_apart(places: Sequence[Place]) -> None:
    kinds: dict[Param, str] = {}
    for place in places:
        other = next((kinds[param] for param in place.params if kinds.get(param, place.kind) != place.kind), "")
        if other:
            raise PassError(
                f"{other} and {place.kind} are dimensions of the same weights",
                option="what",
                remedy="prune them one after the other, in two passes",
            )
        kinds.update(dict.fromkeys(place.params, place.kind))


def matching(copy: Graph, places: Iterable[Place]) -> dict[Place, Place]:
    """For each of ``places`` the same of a copy of their graph."""
    wanted = list(places)
    kinds = list(dict.fromkeys(place.kind for place in wanted))
    found = {str(place.key): place for place in _candidates(copy, coupling_groups(copy), roles(copy), kinds)}
    return {place: found[str(place.key)] for place in wanted}


def _refusal(place: Place, chosen: set[Param]) -> str:
    for group in place.groups:
        normed = "" if place.kind == "hidden" else group.normed
        reason = group.frozen or normed or ("" if place.kind == "experts" else group.chosen)
        if reason:
            return reason
    if place.kind == "hidden":
        return ""
    outside = next((param.name for param in place.params if param not in chosen and place.kind != "experts"), "")
    return f"{outside} belongs to it, which `where` does not select" if outside else ""


def _candidates(
    graph: Graph, groups: Sequence[CouplingGroup], known: Mapping[Param, set[str]], kinds: Sequence[str]
) -> list[Place]:
    found = [place for group in groups if (place := _by_roles(group, known, kinds)) is not None]
    found = [_with_outer(place, found, groups) for place in found]
    found += [_hidden(group) for group in groups if "hidden" in kinds and residual(group)]
    return found + (_experts(graph, groups) if "experts" in kinds else [])


def _hidden(group: CouplingGroup) -> Place:
    """The width of a residual stream, with all that reads it: a head that shares the embedding's table too."""
    return Place("hidden", (group,), tuple(member for member in group.members if _multiplies(member)), least=2)


def _multiplies(member: Member) -> bool:
    """Whether some product sums along ``member``, whatever else the weight is used for."""
    return any((node.op.name, member.axis) in {("linear", 1), ("experts", 2)} for node in member.param.users)


def _by_roles(group: CouplingGroup, known: Mapping[Param, set[str]], kinds: Sequence[str]) -> Place | None:
    """Channels, groups or heads, by what reads and writes the axis."""
    readers = tuple(member for member in group.members if _reads(member))
    writers = [member for member in group.members if member.param.type.rank > 1 and not _reads(member)]
    if not readers or not writers or group.size < 2:
        return None
    roles_read = {name for member in readers for name in known.get(member.param, set())}
    written = {name for member in writers for name in known.get(member.param, set())}
    if "attention.output" not in roles_read:
        inner = any(has_role(roles_read, role) for role in ("mlp.down", "experts.down", "conv")) or (
            roles_read <= {"linear", "head"} and written <= {"linear", "conv"}
        )
        kind = "channels" if inner and not has_role(written, "attention") else ""
    elif all(member.stride == 1 for member in writers):
        kind = ""
    elif "attention.query" not in written:
        kind = "groups" if group.frozen else ""  # heads of another attention, which the report is to name
    elif "attention.key" not in written:
        kind = "heads"
    else:  # without groups of heads, heads are what keys and values have
        alone = len({member.stride for member in writers}) == 1 and "heads" in kinds
        kind = "heads" if alone else "groups"
    return Place(kind, (group,), readers) if kind in kinds else None


def _with_outer(place: Place, found: Sequence[Place], groups: Sequence[CouplingGroup]) -> Place:
    """Query heads lie below the key/value heads that they share."""
    if place.kind != "heads":
        return place
    above = {(m.param, m.axis, m.stride * place.size) for m in place.group.members}
    outer = next((g for g in groups if above <= {(m.param, m.axis, m.stride) for m in g.members}), None)
    return Place(place.kind, place.groups, place.readers, outer)


def _experts(graph: Graph, groups: Sequence[CouplingGroup]) -> list[Place]:
    """Experts with the rows of the router that score them."""
    places: dict[CouplingGroup, Place] = {}
    for site in expert_sites(graph):
        stack = _holding(groups, site.gate_up, 0)
        router = _holding(groups, site.router.input(1), 0) if site.router else None
        if stack is None:
            continue
        if router is None or router.size != site.count or not _chosen_by(site.node, router):
            router = CouplingGroup(
                stack.size,
                stack.members,
                f"`{site.node.op.name}` in `{site.scope}` is not told its experts by one topk",
            )
        readers = tuple(member for member in stack.members if member.param is site.down)
        places[stack] = Place("experts", (stack, router), readers, least=site.active)
    return list(places.values())


def _chosen_by(experts: Node, router: CouplingGroup) -> bool:
    """Whether the numbers of experts come straight from the largest of what ``router`` scores."""
    chooser = experts.input(1).node
    return chooser is not None and chooser.op.name == "topk" and any(v is chooser.input(0) for v, _, _ in router.values)


def _holding(groups: Sequence[CouplingGroup], value: Value, axis: int) -> CouplingGroup | None:
    return next((g for g in groups if any(m.param is value and m.axis == axis for m in g.members)), None)


def _reads(member: Member) -> bool:
    """Whether ``member`` is an axis along which a product sums."""
    nodes = member.param.users
    names = {node.op.name for node in nodes}
    if not _is_matrix(member.param) or not names <= {"linear", "conv", "experts"}:
        return False
    if names == {"experts"}:
        return member.axis == 2
    return member.axis == 1


def _is_matrix(param: Param) -> bool:
    return param.type.rank > 1 and any(node.op.name in ("linear", "conv", "experts") for node in param.users)


def measurable(graph: Graph, places: Sequence[Place]) -> list[Param]:
    """The readers that calibration can measure."""
    known = products(graph)
    return list(dict.fromkeys(m.param for place in places for m in place.readers if m.param in known))
