"""The robot-learning adapter: co-training policies of LeRobot with optimal transport between a simulated and a real dataset.

Thin over the solver, and beside the unmodified `lerobot` package, which nothing here imports before it is asked for.
"""

from .attach import CoTraining, attach_ot, detach_ot, retrieval
from .config import OTConfig, OTCostConfig, OTFeatureSpec, OTLossConfig, OTTermConfig, TransportConfig
from .dataset import LeRobotOTPairDataset
from .draws import DrawLoader
from .encoders import embed
from .loss import CostScale, alarm, compute_ot_loss_for_policy, compute_ot_loss_from_terms, floats

__all__ = [
    "CoTraining",
    "CostScale",
    "DrawLoader",
    "LeRobotOTPairDataset",
    "OTConfig",
    "OTCostConfig",
    "OTFeatureSpec",
    "OTLossConfig",
    "OTTermConfig",
    "TransportConfig",
    "alarm",
    "attach_ot",
    "compute_ot_loss_for_policy",
    "compute_ot_loss_from_terms",
    "detach_ot",
    "embed",
    "floats",
    "retrieval",
]
