"""How a loop ends, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """How the loop ended. `name` for programs, `explanation` for people."""

    name: str
    explanation: str

    def __str__(self) -> str:
        return f"{self.name}: {self.explanation}"


CONVERGED = Status("converged", "The marginals are within the tolerance.")
MAX_ITER = Status(
    "max_iter",
    "The iterations ran out before the marginals were within the tolerance. The number needed grows like (largest cost / eps): "
    "raise max_iter, raise eps, or loosen tol; the last entry of `errors` says how far off the marginals are.",
)
STALLED = Status(
    "stalled",
    "The marginals are as exact as this floating type can hold them, which is less exact than the tolerance asked for; the last entry "
    "of `errors` says how exact. For more digits pass float64 costs or a larger eps, or set a tolerance this type can reach.",
)
INFEASIBLE = Status(
    "infeasible",
    "No plan has these marginals, or moves so much mass: the forbidden pairs (+inf costs) leave some without a partner. The dual has "
    "passed the largest value that any plan could cost, which proves it. Allow more pairs, change the weights, let mass vanish: "
    "penalties=KL(tau), or move less: mass.",
)
DIVERGED = Status(
    "diverged",
    "The potentials left the range of floating numbers. Look for costs that are huge against eps in every pair of a row or column.",
)


def inexact(found: str, tol: float) -> Status:
    """The end of a loop that met the tolerance by the sums of a backend whose own error, as it was measured, is larger."""
    return Status(
        "inexact",
        f"The sums of this backend are less exact than tol = {tol:.3g}: {found}. Loosen tol, raise eps, or take a backend whose sums are "
        'exact: backend="multiscale", or "chunked" for few points.',
    )


def unresolved(error: float, eps: float, least: float) -> Status:
    """The end of a loop whose eps is so small beside the costs that rounding alone moves the marginals: by `error` of the mass in all."""
    return Status(
        "unresolved",
        f"The plan is not the one asked for: its marginals are off by {min(error, 1.0):.2g} of the mass{' or more' if error > 1 else ''}. "
        f"eps = {eps:.3g} is below what the floating type of the potentials resolves of costs this large, which is eps = {least:.2g} or "
        "more: raise eps, or subtract what all pairs pay.",
    )
