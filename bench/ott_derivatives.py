"""OTT-JAX's implicit derivatives of the sharp cost <P, C> and of a linear function <W, P> of the plan, in the cost: three small problems.

    python bench/ott_derivatives.py [--out tests/ott_derivatives.json]

Needs ott-jax, and nothing of gpu_ot: tests/test_gradients.py compares ours with the numbers that this writes. OTT's penalties are
t = tau / (tau + eps), and its entropy is -eps H(P) where ours is eps KL(P | a⊗b). Between hard marginals the plans agree. Where they give
way, OTT's P1 = a' exp(-(f + eps log a) / tau) is ours, a exp(-f / tau), for a' = a^(1 / t): so it is given those weights.

Each derivative is compared with central differences of fourth order through OTT's own solver, entry by entry. Its linear solver stops at
1e-6 unless told otherwise; what that leaves is written beside what a tolerance of 1e-13 does.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from jax import numpy as jnp  # noqa: E402
from ott.geometry.geometry import Geometry  # noqa: E402
from ott.problems.linear.linear_problem import LinearProblem  # noqa: E402
from ott.solvers.linear.implicit_differentiation import ImplicitDiff  # noqa: E402
from ott.solvers.linear.sinkhorn import Sinkhorn  # noqa: E402

Array = np.ndarray
OUT = Path(__file__).parents[1] / "tests" / "ott_derivatives.json"
#: Of the marginals, of the linear solver, and the step of the differences, in units of the cost.
THRESHOLD, RTOL, STEP = 1e-14, 1e-13, 1e-3
DEFAULT = ImplicitDiff()
TIGHT = ImplicitDiff(solver_kwargs=dict(rtol=RTOL, atol=RTOL, max_steps=20_000))


def problems() -> list[dict]:
    """(C, W, a, b, eps, tau), tau = inf where the marginal is hard."""
    rng = np.random.default_rng(0)

    def weights(n: int) -> Array:
        w = rng.random(n) + 0.2
        return w / w.sum()

    def clouds(n: int, m: int) -> Array:
        x, y = rng.random((n, 2)), rng.random((m, 2)) + 0.2
        return ((x[:, None] - y) ** 2).sum(-1)

    def problem(name: str, C: Array, eps: float, tau: tuple[float, float]) -> dict:
        n, m = C.shape
        return dict(name=name, C=C, W=rng.normal(size=(n, m)), a=weights(n), b=weights(m), eps=eps, tau=tau)

    return [
        problem("balanced, clouds", clouds(6, 8), 0.1, (math.inf, math.inf)),
        problem("balanced, matrix", rng.random((9, 7)), 0.05, (math.inf, math.inf)),
        problem("KL, unequal taus", clouds(7, 8), 0.1, (0.4, 0.9)),
    ]


def plan(C: jax.Array, p: dict, how: ImplicitDiff) -> jax.Array:
    sides = []
    for w, tau in zip((p["a"], p["b"]), p["tau"], strict=True):
        t = 1.0 if math.isinf(tau) else tau / (tau + p["eps"])
        sides.append((jnp.asarray(w ** (1 / t)), t))
    (a, tau_a), (b, tau_b) = sides
    solver = Sinkhorn(threshold=THRESHOLD, max_iterations=100_000, implicit_diff=how)
    return solver(LinearProblem(Geometry(cost_matrix=C, epsilon=p["eps"]), a=a, b=b, tau_a=tau_a, tau_b=tau_b)).matrix


def outputs(p: dict, how: ImplicitDiff) -> dict[str, Callable[[jax.Array], jax.Array]]:
    W = jnp.asarray(p["W"])
    return {"sharp_cost": lambda C: (plan(C, p, how) * C).sum(), "linear": lambda C: (plan(C, p, how) * W).sum()}


def differences(function: Callable[[jax.Array], jax.Array], C: Array) -> Array:
    """d function / dC, one entry at a time."""
    at = jax.jit(function)
    out = np.empty_like(C)
    for ij in np.ndindex(*C.shape):
        step = np.zeros_like(C)
        step[ij] = STEP
        far, near, on, beyond = (float(at(jnp.asarray(C + k * step))) for k in (-2, -1, 1, 2))
        out[ij] = (far - 8 * near + 8 * on - beyond) / (12 * STEP)
    return out


def derivatives(p: dict) -> dict:
    C = jnp.asarray(p["C"])
    found: dict = {"plan": np.asarray(plan(C, p, TIGHT)).tolist()}
    for (name, function), default in zip(outputs(p, TIGHT).items(), outputs(p, DEFAULT).values(), strict=True):
        value, grad = jax.jit(jax.value_and_grad(function))(C)
        truth, loose = differences(function, p["C"]), jax.jit(jax.grad(default))(C)
        size = np.abs(truth).max()
        off, off_loose = (float(np.abs(np.asarray(g) - truth).max() / size) for g in (grad, loose))
        print(f"{p['name']:<18}{name:<11} off differences by {off:.1e} of the largest entry; by {off_loose:.1e} with OTT's defaults")
        found[name] = {"value": float(value), "grad": np.asarray(grad).tolist(), "off_differences": off, "off_by_default": off_loose}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rows = []
    for p in problems():
        inputs = {key: z.tolist() if isinstance(z, np.ndarray) else z for key, z in p.items()}
        inputs["tau"] = [None if math.isinf(tau) else tau for tau in p["tau"]]
        rows.append(inputs | derivatives(p))
    versions = {name: version(name) for name in ("ott-jax", "jax", "jaxlib", "lineax", "numpy")}
    settings = dict(threshold=THRESHOLD, rtol=RTOL, difference_step=STEP)
    given.out.write_text(json.dumps({"versions": versions, "settings": settings, "problems": rows}) + "\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
