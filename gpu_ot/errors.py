"""The errors. A message names the argument, what was found, and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class ProblemError(ValueError):
    """The problem has no solution as posed: a shape, a weight, a cost or a regularisation is wrong."""


class UnequalMasses(ProblemError):
    """The two measures of a balanced problem have different masses."""


class BackendError(RuntimeError):
    """No backend, or not the one named, can serve this problem."""


class NotConverged(RuntimeError):
    """Raised only on request (`strict=True`): the loop stopped before its tolerance."""


class RankRefused(ProblemError):
    """Some ranks of a group refuse their arguments; raised on all of them."""

    unanimous: bool = False  # the same refusal on every rank


class RanksDiffer(ProblemError):
    """The ranks of a group have different arguments; raised on all of them."""


class RankFailed(RuntimeError):
    """Another rank of the group has failed or ended, or does not answer within the timeout of the group."""


def shape(of: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, of)) + ("," if len(of) == 1 else "") + ")"


def not_a_tensor(name: str, found: object) -> ProblemError:
    return ProblemError(f"{name} must be a tensor of numbers, found {type(found).__name__}.")


def not_a_problem(found: object) -> ProblemError:
    return ProblemError(
        f"gpu_ot.solve takes a gpu_ot.Problem, found {type(found).__name__}. Pose it, gpu_ot.solve(gpu_ot.Problem(M, eps, a, b)), or for "
        "POT's call and its result write gpu_ot.pot.solve(M, a, b, reg)."
    )


def unusable_tensor(name: str, kind: str, remedy: str) -> ProblemError:
    return ProblemError(f"{name} is {kind}; transport needs dense, real numbers. {remedy}")


def mixed_devices(found: dict[str, str]) -> ProblemError:
    where = ", ".join(f"{name} on {device}" for name, device in found.items())
    return ProblemError(
        f"all inputs must live on one device, found {where}. Move them with .to(device) first: nothing is copied in silence."
    )


def wrong_shape(name: str, found: Sequence[int], expected: str) -> ProblemError:
    return ProblemError(f"{name} has shape {shape(found)}, expected {expected}.")


def empty_problem(n: int, m: int) -> ProblemError:
    return ProblemError(f"the cost has shape ({n}, {m}): both sides need at least one point.")


def bad_weights(name: str, n_nan: int, n_negative: int, n_infinite: int) -> ProblemError:
    counts = {"NaN": n_nan, "negative": n_negative, "infinite": n_infinite}
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return ProblemError(f"{name} must hold finite weights >= 0, found {found}. Zero is legal and means an empty atom.")


def no_mass(name: str) -> ProblemError:
    return ProblemError(
        f"{name} sums to 0: there is no mass to move. Pass weights with a positive sum, or leave {name} out for uniform ones."
    )


def broken_cost(name: str, count: int, what: str) -> ProblemError:
    return ProblemError(
        f"{name} holds NaN or an infinity of the wrong sign in {count} of its {what}. Mend it where it is computed; "
        "in a matrix of costs, a forbidden pair is written +inf."
    )


def forbidden_lines(name: str, line: str, count: int, weights: str) -> ProblemError:
    return ProblemError(
        f"{count} {line}{'s' if count > 1 else ''} of {name} with positive weight in {weights} hold only +inf: their mass may go "
        f"nowhere. Allow at least one pair in each {line}, or set those entries of {weights} to 0."
    )


def bad_eps(name: str, found: object) -> ProblemError:
    return ProblemError(
        f"{name} must be a finite number > 0 in units of the cost, found {found}. Around 1 % of the typical cost is sharp; "
        "unregularised transport is another algorithm (POT's ot.emd)."
    )


def unequal_masses(mass_a: float, mass_b: float) -> UnequalMasses:
    return UnequalMasses(
        f"balanced transport moves every unit of mass, but sum(a) = {mass_a:.6g} and sum(b) = {mass_b:.6g}. "
        "Normalise the weights, or let mass appear and vanish: penalty=KL(tau) with tau near the "
        "longest distance (in cost units) that is still worth travelling."
    )


def bad_mass(found: float, most: float) -> ProblemError:
    return ProblemError(
        f"mass must be between 0 and the smaller of sum(a) and sum(b), {most:.6g}, found {found:.6g}: more than there is cannot move. "
        "Pass a fraction of it, mass=0.9 * min(a.sum(), b.sum())."
    )


def unknown(name: str, found: object, known: Sequence[str]) -> ProblemError:
    return ProblemError(f"{name} = {found!r} is not known; choose one of {', '.join(map(repr, known))}.")


def backend_refused(name: str, why: str) -> BackendError:
    return BackendError(f'backend "{name}" cannot serve this problem: {why}')


def rank_refused(refusals: Sequence[tuple[int, str]], size: int) -> RankRefused:
    ranks_of: dict[str, list[str]] = {}
    for rank, message in refusals:
        ranks_of.setdefault(message, []).append(str(rank))
    error = RankRefused("; ".join(f"rank {', '.join(ranks)} of {size}: {message}" for message, ranks in ranks_of.items()))
    error.unanimous = len(refusals) == size and len(ranks_of) == 1
    return error


def ranks_differ(name: str, one: int, has: str, other: int, found: str) -> RanksDiffer:
    return RanksDiffer(
        f"all ranks must ask for the same, and {name} differs: rank {one} has {has}, rank {other} has {found}. Pass equal arguments on "
        "every rank; only points and their weights are each rank's own."
    )


def rank_failed(rank: int, size: int, doing: str, cause: str | None, message: str) -> RankFailed:
    cause = cause or "some rank ended or did not answer within the timeout of the group"
    return RankFailed(f"the {size} ranks cannot go on: {cause} (noticed by rank {rank} in {doing}: {message})")
