"""How outputs depend on inputs: by the envelope theorem, implicitly, or through the iterations."""

from .coupling import barycentric, held_cost, inner, plan, plan_cost, plan_product
from .envelope import dual, pull_dual, refuse_learnable, value
from .functorch import outside
from .operators import Differentiable, Each, apply, pull_apply, pull_back, pull_held, pull_softmin, softmin

__all__ = [
    "Differentiable",
    "Each",
    "apply",
    "barycentric",
    "dual",
    "held_cost",
    "inner",
    "outside",
    "plan",
    "plan_cost",
    "plan_product",
    "pull_apply",
    "pull_back",
    "pull_dual",
    "pull_held",
    "pull_softmin",
    "refuse_learnable",
    "softmin",
    "value",
]
